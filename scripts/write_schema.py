"""Writes what is said of the config classes elsewhere: configs/schema.json, gpt/cli/knobs.txt."""

import json
from pathlib import Path

from gpt.configfile import json_schema, knobs_help

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "configs" / "schema.json"
KNOBS = ROOT / "gpt" / "cli" / "knobs.txt"

if __name__ == "__main__":
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    SCHEMA.write_text(text + "\n", encoding="utf-8")
    KNOBS.write_text(knobs_help(), encoding="utf-8")
