"""In how many parts the numbers of a message travel."""

MOST_BYTES = 2**21
"""Most bytes of numbers that travel in one request (Flower's default is 5 MB)."""
LEAST_BYTES, MOST_PARTS = 2**19, 64


def part_bytes(size: int) -> int:
    """Bytes of numbers that travel in one request of a message.

    What has arrived is not sent again after an interruption, so parts are small. Each of them is a
    request at every place that a message passes, so a message with more than 64 such parts has
    larger ones. A client waits for the answer to a request in proportion to its size, down to 64
    kbit/s (`supernode.be_patient`), so any part passes over any link that is not slower.

    Args:
        size: Bytes of the message's numbers.
    """
    return min(MOST_BYTES, max(LEAST_BYTES, -(-size // MOST_PARTS)))
