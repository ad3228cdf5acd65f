"""What a benchmark raises when its numbers must not be written."""


class Refused(Exception):  # noqa: N818
    """A check was not green; the message names every case that failed."""
