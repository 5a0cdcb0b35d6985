"""The one exception for wrong input: its message is one line that names what was seen and what is allowed."""


class WrongInput(Exception):
    """Raised for anything the caller can mend; the command line prints it and exits with 2.

    Not a ValueError, which argument parsers catch and dress up.
    """
