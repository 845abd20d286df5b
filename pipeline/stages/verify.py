"""The verify stage: every hash and every link of a folder of ours, checked; nothing is written or loaded."""

from __future__ import annotations

from pipeline.errors import EXIT_FAILED, EXIT_OK, UserError, one_line
from pipeline.plan.request import Request, usable_place
from pipeline.run_folder.verify import verify_folder


def verify(request: Request) -> int:
    """Print what of the folder is whole, damaged, foreign or missing; 0 where all of it is whole, else 1.

    Raises:
        UserError: more than one folder is named, or one that is none of ours.
    """
    if len(request.overrides) > 1 or (request.overrides and request.run_dir is not None):
        raise UserError("verify", " ".join(request.overrides), "takes one folder", "Example: loradrop verify runs/mine")
    folder = usable_place(request.overrides[0]) if request.overrides else request.run
    findings = verify_folder(folder)
    width = max(len(found.name) for found in findings)
    for found in findings:
        print(one_line(f"{found.state:8} {found.name:{width}}  {found.detail}").rstrip())
    wrong = sum(found.state != "whole" for found in findings)
    print(f"\n{folder.name}: " + (f"{wrong} of {len(findings)} are not whole" if wrong else "whole"))
    return EXIT_FAILED if wrong else EXIT_OK
