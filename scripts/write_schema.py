"""Writes configs/schema.json, the JSON schema of a config, from the config classes."""

import json
from pathlib import Path

from gpt.configfile import json_schema

SCHEMA = Path(__file__).parent.parent / "configs" / "schema.json"

if __name__ == "__main__":
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    SCHEMA.write_text(text + "\n", encoding="utf-8")
