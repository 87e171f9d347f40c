"""In how many parts the numbers of a message travel."""

MOST_BYTES = 2**21
"""Most bytes of numbers that travel in one request (Flower's default is 5 MB)."""
LEAST_BYTES, MOST_PARTS = 2**19, 64


def part_bytes(size: int) -> int:
    """Bytes of numbers that travel in one request of a message.

    A part that a link cannot pass within three minutes never arrives, see `supernode.be_patient`:
    512 KB pass at 32 kbit/s. Each part is a request at every place that a message passes; a message
    with more than 64 such parts has larger ones, up to 2 MB, which pass at 100 kbit/s: over a
    slower link it would take most of an hour anyway.

    Args:
        size: Bytes of the message's numbers.
    """
    return min(MOST_BYTES, max(LEAST_BYTES, -(-size // MOST_PARTS)))
