"""`python -m lgc` is the installed `lgc` command, whoever provides it: the library does not know its application."""

from importlib.metadata import entry_points

if __name__ == "__main__":
    (command,) = entry_points(group="console_scripts", name="lgc")
    command.load()()
