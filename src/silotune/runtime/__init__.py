"""Where the two halves of a round meet."""
