"""Write the help texts that are shipped, which `ordmoe COMMAND --help` prints without an import.

python -m tests.help_texts
"""

import ordmoe


def help_text(command: str) -> str:
    """What the parser of a command prints."""
    return ordmoe.module_of(command).build_parser().format_help()


def main() -> None:
    ordmoe.HELP_TEXTS.mkdir(exist_ok=True)
    for command in ordmoe.COMMANDS:
        text = f"{ordmoe.made_with()}\n{help_text(command)}"
        (ordmoe.HELP_TEXTS / f"{command}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
