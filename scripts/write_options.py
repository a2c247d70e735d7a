"""Write down the options of all commands, for help without torch: `python scripts/write_options.py`."""

from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.commands.line.outline import OPTIONS_FILE, outline

if __name__ == "__main__":
    kinds = {name: command.load()[0] for name, command in COMMANDS.items()}
    OPTIONS_FILE.write_text(outline(kinds), encoding="utf-8")
