"""What each codec leaves out of a run's whole change: `python benchmarks/codec_errors.py RUN`.

RUN is a finished run of LoRA. Its factors B begin at zero, so at the end they are the change.
Prints the relative error before error feedback, and the bytes beside float32.
"""

import argparse
from pathlib import Path

import silotune
from silotune.compression.changes import CODECS, codec_of, encode_change
from silotune.compression.config import WireConfig
from silotune.core.tree import l2_norm, size_bytes

CASES = {name: WireConfig() for name in CODECS} | {"topk, share 0.01": WireConfig(share=0.01)}


def main() -> None:
    """Print one line per codec."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    adapter = silotune.Run(options.parse_args().run).adapter()
    change = {name: t.float() for name, t in adapter.items() if "lora_B" in name}
    print(f"{sum(t.numel() for t in change.values())} numbers")
    for label, cfg in CASES.items():
        codec = codec_of(label.split(",")[0], cfg)
        assert codec is not None
        payload, left = encode_change(codec, change)
        smaller = size_bytes(change) / size_bytes(payload)
        print(f"{label:20} {l2_norm(left) / l2_norm(change):7.2%}  1/{smaller:.1f}")


if __name__ == "__main__":
    main()
