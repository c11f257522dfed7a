"""The table of settings in the README, made from the settings themselves.

python -m tests.settings_table     puts the current one into the README
"""

from pathlib import Path
from typing import Final

from idalloc_tcp.config import describe

README: Final = Path(__file__).parent.parent / "README.md"
COMMAND: Final = "python -m tests.settings_table"
BEGIN: Final = f"<!-- settings: made by `{COMMAND}` -->\n"
END: Final = "<!-- end of settings -->\n"


def table() -> str:
    """A row for each setting, in the order of the class."""
    rows = ["| setting | default | takes | what it does |", "|---|---|---|---|"]
    for setting in describe():
        cells = (f"`{setting.name}`", f"`{setting.default}`", setting.type, setting.help)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    """The README with the current table between its markers.

    Raises:
        ValueError: the markers are not there, or not once each.
    """
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
