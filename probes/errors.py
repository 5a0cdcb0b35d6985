"""The one exception for wrong input: its message is one line that names what was seen and what is allowed."""


class WrongInput(ValueError):
    """Raised for anything the caller can mend; the command line prints it and exits with 2."""
