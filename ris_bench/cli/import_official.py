"""ris-bench import-official."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    official = verbs.add_parser(
        "import-official",
        help="turn a released checkpoint of ETRIS or DETRIS into a model of ours",
        description="Reads a best_model.pth of ETRIS (R50, R101, ViT-B/16) or DETRIS (B, L) without executing anything "
        "in it, and writes model.safetensors, with every tensor of the model, and model.json, which says what it is.",
    )
    official.set_defaults(call=_call)
    official.add_argument("checkpoint", type=Path, metavar="CKPT")
    official.add_argument(
        "--arch", metavar="NAME", help="such as etris-r101 or detris-b (default: judged by the tensors)"
    )
    official.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def _call(args: argparse.Namespace) -> int:
    from ris_bench import official  # only now: it imports torch

    print(json.dumps(official.import_official(args.checkpoint, args.out, args.arch), indent=1))
    return 0
