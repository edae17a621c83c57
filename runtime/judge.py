"""A server the user names decides open questions: yes or no to "does this agree with the reference?"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from runtime.api import Done, Sampling
from runtime.images import question
from runtime.loading import load
from vlm.console import note, track
from vlm.scoring.mme_reasoning import judge_question
from vlm.scoring.summary import Record

VERDICT_TOKENS = 16


def judge(records: Sequence[Record], address: str, root: Path) -> list[Record]:
    """Records with the open questions' scores replaced by verdicts, kept in `judged.jsonl` so that none is asked twice.

    A judge that says neither 0 nor 1 leaves the rule's score in place and is counted aloud.
    """
    kept = root / "judged.jsonl"
    known = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            try:
                verdict = json.loads(line)
            except ValueError:
                break  # cut off by a crash
            known[verdict["key"]] = verdict["said"]
    asked = {r["id"]: judge_question(r["truth"], r["prediction"]) for r in records if not r.get("error")}
    left = {name: text for name, text in asked.items() if text is not None}
    with load(address, "openai") as engine, kept.open("a") as file:
        keys = {name: _key(engine.info.name, text) for name, text in left.items()}
        new = [(name, text) for name, text in left.items() if keys[name] not in known]
        for name, text in track(new, len(new), "judge"):
            events = engine.complete([question(text)], Sampling(max_new_tokens=VERDICT_TOKENS), reuse="none")
            said = next(event.text for event in events if isinstance(event, Done)).strip()
            known[keys[name]] = said
            file.write(json.dumps({"key": keys[name], "id": name, "said": said}) + "\n")
            file.flush()
    verdicts = {name: known[key][:1] for name, key in keys.items()}
    if unclear := sum(verdict not in ("0", "1") for verdict in verdicts.values()):
        note(f"warning: the judge gave no 0 or 1 for {unclear} of {len(verdicts)} questions; their rule's score stands")
    return [
        {**r, "score": float(verdicts[r["id"]]), "judged": True} if verdicts.get(r["id"], "") in ("0", "1") else r
        for r in records
    ]


def _key(model: str, text: str) -> str:
    return hashlib.sha256(f"{model}\n{text}".encode()).hexdigest()
