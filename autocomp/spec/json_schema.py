"""The JSON schema of a spec, for editors: `python -m autocomp.spec.json_schema FILE` writes it.

`search_spaces/schema.json` is committed; a test holds it equal to what this module renders.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from autocomp.core.files import write_text_atomic
from autocomp.spec.schema import Spec


def json_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of a spec file."""
    schema = Spec.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "autocomp spec",
    }


def render() -> str:
    """The text of `search_spaces/schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_text_atomic(Path(sys.argv[1]), render())
