"""Values that no field expects, and damage to bytes and JSON."""

import json
from pathlib import Path
from random import Random

NUMBERS = (
    *("0", "-1", "-0.0", "1.5", "1e308", "1e-320", "nan", "inf", "-inf", "0x7fffffff", "1_000"),
    *("9223372036854775808", "1" + "0" * 400),
)
TEXTS = (
    *('""', '" "', '"\\u0000"', '"\\u001b[31mred"', '"\\n\\n"', '"<script>alert(1)</script>"'),
    *('"../../etc/passwd"', '"/dev/zero"', '"/"', '"~"', '"none"', '"auto"', '"1"', '"%s%n"'),
    *('"{question}{{"', '"{"', '"{0.__class__}"', '"\\uFFFD\\u202e"', '"e\\u0301"', '"\\ud800"'),
    '"' + "x" * 70_000 + '"',
)
SHAPES = (
    *("true", "false", "[]", "[[]]", "{}", "{a=1}", "[1,2,3]", '["a","a"]'),
    *("1979-05-27", "1979-05-27T07:32:00Z"),
)
ODD_TOML = (*NUMBERS, *TEXTS, *SHAPES)
"""Values as TOML: of every type, at every edge, and some that are no TOML."""

ODD_JSON = (None, True, -1, 0, 2**53, 2**64, 10**30, 1e308, float("nan"), float("inf"), "nan", "")
ODD_OBJECTS = (*ODD_JSON, "x" * 100_000, [], {}, "\x1b[31m", "\ud800", "<b>", "\u202e")


def damage_bytes(draw: Random, data: bytes) -> tuple[bytes, str]:
    """Damage a file's contents in one of twelve ways; also the name of the way."""
    at = draw.randrange(len(data) + 1)
    some = bytes(draw.randrange(256) for _ in range(draw.randint(1, 60)))
    length = draw.randint(1, max(1, len(data) // 3))
    ways = {
        "bit flipped": lambda: _flip(draw, data),
        "cut": lambda: data[:at],
        "part gone": lambda: data[:at] + data[at + draw.randint(1, 40) :],
        "part twice": lambda: data[:at] + data[max(0, at - 40) : at] + data[at:],
        "NUL": lambda: data[:at] + b"\0" * draw.randint(1, 5) + data[at:],
        "UTF-16": lambda: data.decode("latin-1").encode("utf-16"),
        "byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "line ends": lambda: data.replace(b"\n", b"\r"),
        "tail": lambda: data + some,
        "not UTF-8": lambda: data[:at] + b"\xff\xfe\xfd" + data[at:],
        "zeros": lambda: data[:at] + b"\0" * len(data[at : at + length]) + data[at + length :],
        "empty": lambda: b"",
    }
    name = draw.choice(sorted(ways))
    return ways[name](), name


def _flip(draw: Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(draw.randint(1, 8) if data else 0):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def damage_file(draw: Random, path: Path) -> str:
    """Damage a file, remove it, or put a folder in its place. Returns what was done."""
    how = draw.choice(["bytes", "bytes", "bytes", "gone", "folder", "value"])
    if how == "value" and path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [json.loads(line) for line in lines]
        changed = change_value(draw, values, ODD_OBJECTS)
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return f"value of {changed}"
    if how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        data, how = damage_bytes(draw, path.read_bytes())
        path.write_bytes(data)
    return how


def change_value(draw: Random, inside: object, odd: tuple[object, ...]) -> str:
    """Put an odd value somewhere into lists and dicts. Returns its key."""
    while True:
        assert isinstance(inside, dict | list)
        if not inside:
            return "nothing"
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
        key = draw.choice(list(keys))
        below = inside[key]
        if isinstance(below, dict | list) and below and draw.random() < 0.7:
            inside = below
            continue
        inside[key] = draw.choice(odd)
        return str(key)
