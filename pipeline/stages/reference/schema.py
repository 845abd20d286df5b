"""`loradrop schema`: the JSON Schema of a configuration file, for editors."""

from __future__ import annotations

import json

from pipeline.config.names.reference import json_schema
from pipeline.errors import EXIT_OK
from pipeline.plan.request import Request


def show_schema(_: Request) -> int:
    """Print it: `loradrop schema > loradrop.schema.json`."""
    print(json.dumps(json_schema(), ensure_ascii=False, indent=2))
    return EXIT_OK
