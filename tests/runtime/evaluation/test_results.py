"""What `eval` scores and who else asks: another reading, servers, batches, comparisons, judges, wrong options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime import cli
from runtime import evaluate as command_module
from runtime.api import Message
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from tests.runtime.conftest import ROOT
from tests.runtime.serving import png, running
from vlm.console import run_command
from vlm.errors import GateFailed, UserError

from .scripted import Scripted, evaluate, last_letter, lines, make_data


def test_another_reading_needs_no_model(tmp_path: Path, model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [{"question_id": str(n), "question": f"Which {n}?", "options": list("abcd"), "answer": "A", "data_type": "image",
             "image_1": {"bytes": png(n), "path": None}} for n in range(8)]  # fmt: skip
    (tmp_path / "d").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d/part.parquet")
    model._reply = lambda _: ""
    scores = []
    for mode in ("strict", "official", "strict"):
        cli.main(["eval", "x", "--backend", "fake", "--task", "av-odyssey", "--data", str(tmp_path / "d"), "--out",
                  str(tmp_path / "out"), "--mode", mode, "--json"])  # fmt: skip
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1])["score"])
    assert scores == [0.0, 1.0, 0.0]  # the official script reads every empty reply as A
    assert (model.opened, model.asked) == (1, 8)


@pytest.mark.parametrize("concurrency", ["1", "4"])
def test_a_server_scores_as_the_model_behind_it(tmp_path: Path, model: Scripted, concurrency: str) -> None:
    data = make_data(tmp_path / "d")
    evaluate(data, tmp_path / "local")
    command_module.load = pytest.importorskip("runtime.loading").load  # the fixture puts the script back
    with running(Scripted()(), name="scripted") as server:
        given = ["eval", server.url, "--task", "json", "--data", str(data), "--out", str(tmp_path / "remote")]
        cli.main([*given, "--concurrency", concurrency])
    local, remote = (
        [(row["id"], row["prediction"], row["score"]) for row in lines(tmp_path / name / "samples.jsonl")]
        for name in ("local", "remote")
    )
    assert local == remote


LMMS_EVAL: dict[str, Any] = {"max_tokens": 16, "temperature": 0}


VLMEVALKIT: dict[str, Any] = {"temperature": 0, "max_tokens": 2048}


@pytest.mark.parametrize(("fields", "detail"), [(LMMS_EVAL, {}), (VLMEVALKIT, {"detail": "low"})])
def test_requests_of_other_evaluations_are_answered(fields: dict[str, Any], detail: dict[str, str]) -> None:
    """The bodies that lmms-eval's `openai` and VLMEvalKit's `GPT4V` send: whole replies, image first, no stream."""
    import base64
    import urllib.request

    url = f"data:image/png;base64,{base64.b64encode(png(3)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url, **detail}}, {"type": "text", "text": "Say 7"}]
    with running(Scripted()(), name="student") as server:
        body = json.dumps({"model": "student", "messages": [{"role": "user", "content": content}], **fields}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
        request = urllib.request.Request(f"{server.url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            reply = json.loads(response.read())
    assert reply["choices"][0]["message"]["content"] == "7"
    assert reply["usage"]["completion_tokens"] >= 1


def test_batches_give_the_tokens_of_one_at_a_time(student: Path, tmp_path: Path) -> None:
    """Prompts of different lengths, with and without images, more than fit in one batch."""
    data = make_data(tmp_path / "d", 11)
    rows = json.loads((data / "task.json").read_text())
    for n, row in enumerate(rows):
        row["question"] = "Which digit is at the top left? " * (n % 4) + f"Read {n}."
        if n % 5 == 4:
            del row["image"]
    (data / "task.json").write_text(json.dumps(rows))
    for name, more in (("one", []), ("batch", ["--batch", "4"])):
        given = ["eval", str(student), "--task", "json", "--data", str(data), "--out", str(tmp_path / name)]
        assert cli.main([*given, "--max-new-tokens", "12", *more]) == 0
    one, batch = (
        [
            (row["id"], row["prediction"], row["finish"], row["tokens"])
            for row in lines(tmp_path / name / "samples.jsonl")
        ]
        for name in ("one", "batch")
    )
    assert one == batch
    assert len({prediction for _, prediction, _, _ in one}) > 3


def test_compare(tmp_path: Path, model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "d", 60)
    evaluate(data, tmp_path / "a")
    model._reply = lambda messages: "?" if last_letter(messages) in "12" else last_letter(messages)
    evaluate(data, tmp_path / "b", artefact="worse")
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--fail-if", "worse", "--json"]) == 0
    same = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (same["significant"], same["p"], same["difference"]) == (False, 1.0, 0.0)
    with pytest.raises(GateFailed, match="is worse by"):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b/result.json"), "--fail-if", "worse", "--json"])
    output = capsys.readouterr().out
    value = json.loads(output.splitlines()[-1])
    # of the 12 questions that end in 1 or 2, a third was wrong before
    assert (value["better"], value["worse"], value["significant"]) == (0, 8, True)
    assert "B is worse" in output
    assert cli.main(["compare", str(tmp_path / "b"), str(tmp_path / "a"), "--fail-if", "worse"]) == 0


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path, model: Scripted) -> None:
    evaluate(make_data(tmp_path / "d"), tmp_path / "a")
    evaluate(make_data(tmp_path / "e", 10), tmp_path / "b")
    with pytest.raises(UserError, match="are over other questions"):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    other = make_data(tmp_path / "f")  # the same ids, another question
    (other / "task.json").write_text((other / "task.json").read_text().replace("Say 7", "Tell 7"))
    evaluate(other, tmp_path / "c")
    with pytest.raises(UserError, match="are over other questions"):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "c")])
    judged = json.loads((tmp_path / "a/result.json").read_text()) | {"judge": "http://judge"}
    (tmp_path / "d2").mkdir()
    (tmp_path / "d2/result.json").write_text(json.dumps(judged))
    (tmp_path / "d2/samples.jsonl").write_bytes((tmp_path / "a/samples.jsonl").read_bytes())
    with pytest.raises(UserError, match="decided by rules and by the judge at http://judge"):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "d2")])
    # a task with one reading has one, whatever --mode says
    evaluate(tmp_path / "d", tmp_path / "a2", "--mode", "strict")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "a2")]) == 0
    with pytest.raises(UserError, match="holds no finished evaluation"):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path)])
    with pytest.raises(UserError, match="for evaluations write `--fail-if worse`"):
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--fail-if", "ttft_ms+5%"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "kind"], "--mode is 'kind'; known: strict, official"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--concurrency", "2"], "--concurrency is for servers"),
        (["--batch", "0"], "--batch is 0"),
        (["--samples", "-1"], "is not a whole number"),
        (["--judge", "http://127.0.0.1:1"], "--judge is for mme-reasoning"),
        (["--missing", "maybe"], "invalid choice: 'maybe'"),
        (["--images", "nowhere"], "images of json are missing"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, model: Scripted, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", "x", "--backend", "fake", "--task", "json", "--data", str(make_data(tmp_path / "d", 3))]
    with pytest.raises(SystemExit) as caught:
        run_command(cli.main, [*given, "--out", str(tmp_path / "out"), *more])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert caught.value.code == 2
    assert len(error) == 1
    assert message in error[0]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    code = f"""
import sys
sys.modules["pyarrow"] = None
from runtime.cli import main
from vlm.console import run_command
run_command(main, ["eval", "x", "--backend", "fake", "--task", "json", "--data", {str(tmp_path / "t.parquet")!r}])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 3
    assert "pip install 'align-edge[eval]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_split_without_answers_gives_the_upload_file(
    tmp_path: Path, model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    import base64
    import zipfile

    image = base64.b64encode(png(1)).decode()
    rows = [f"{n}\tWhat is it {n}?\tcat\tdog\tnan\tnan\t{image}\ttest" for n in (4, 9)]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/mmbench_test.tsv").write_text("\n".join(["index\tquestion\tA\tB\tC\tD\timage\tsplit", *rows]))
    model._reply = lambda _: "A"
    given = [
        "eval",
        "x",
        "--backend",
        "fake",
        "--task",
        "mmbench",
        "--data",
        str(tmp_path / "d"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main([*given, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["score"] is None
    assert "this split has no answers" in captured.err
    with zipfile.ZipFile(tmp_path / "out/submission.xlsx") as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert sheet.count("<row>") == 3
    assert model.asked == 4  # two questions, two rotations each
    with pytest.raises(UserError, match="holds no scored evaluation"):
        cli.main(["compare", str(tmp_path / "out"), str(tmp_path / "out")])


def test_the_judge_decides_open_questions_once(tmp_path: Path, model: Scripted) -> None:
    rows = [
        {
            "index": 1,
            "question": "How far?",
            "answer": "2 km",
            "question_type": "open",
            "capability": "",
            "reasoning_type": "",
        },
        {
            "index": 2,
            "question": "Which?",
            "answer": "A",
            "question_type": "choice",
            "capability": "",
            "reasoning_type": "",
        },
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    model._reply = lambda messages: "2000 metres" if "How far" in str(messages[-1].content[-1]) else "A"
    given = ["eval", "x", "--backend", "fake", "--task", "mme-reasoning", "--data", str(tmp_path / "q.json"), "--out",
             str(tmp_path / "out")]  # fmt: skip
    cli.main(given)
    assert [row["score"] for row in lines(tmp_path / "out/samples.jsonl")] == [0.0, 1.0]
    asked = []

    def verdict(messages: Sequence[Message]) -> str:
        asked.append(str(messages[-1].content[-1]))
        return "1"

    with running(Engine(FakeBackend(FakeScript(reply=verdict, context_length=1 << 14)))) as server:
        for _ in range(2):
            cli.main([*given, "--judge", server.url])
    assert [row["score"] for row in lines(tmp_path / "out/samples.jsonl")] == [1.0, 1.0]
    assert len(asked) == 1
    assert "Reference: 2 km" in asked[0]


def test_samples_are_drawn_whole(tmp_path: Path) -> None:
    from runtime.tasks import read_task
    from runtime.tasks.base import TaskOptions

    for n in range(30):
        folder = tmp_path / ("count" if n % 2 else "color")
        folder.mkdir(exist_ok=True)
        (folder / f"{n}.png").write_bytes(png(n))
        (folder / f"{n}.txt").write_text(f"Is it {n}? Please answer yes or no.\tYes\nIs it not {n}?\tNo\n")
    drawn = [read_task("mme", TaskOptions(data=tmp_path, samples=10, seed=seed)) for seed in (0, 0, 1)]
    for task in drawn:
        assert len(task.items) == 10
        assert len({item.group["image_key"] for item in task.items}) == 5
    assert drawn[0] == drawn[1]
    assert drawn[0].items != drawn[2].items
