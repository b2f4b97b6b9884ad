"""The exception for a setting or an input that cannot work."""


class SettingError(ValueError):
    """A setting, label or batch that cannot work; the message names it, its value and the fix.

    The command line prints it as one line and exits with code 2; any other exception keeps its traceback.
    """
