"""The generation loop against a scripted backend on a clock that moves only when told to."""

from __future__ import annotations

import pytest
from PIL import Image as Pillow

from runtime.api import EncodedImage, Sampling, Span, Token
from runtime.backend_fake import END, IMAGE_TOKENS, FakeScript
from runtime.images import question
from runtime.latency import timing

from .scripted import MS, fake, last, picture, run


def test_latencies_are_exactly_the_scripted_ones() -> None:
    engine, _, _ = fake("abc", prepare_ns=3 * MS, encode_ns=50 * MS, prefill_ns=20 * MS, step_ns=7 * MS)
    with engine:
        got = timing(run(engine))
    assert got.ttft_ms == 73.0
    assert got.tpot_ms == 7.0  # a, b, c and the end token: three gaps, not four
    assert got.itl_ms == (7.0, 7.0, 7.0)
    assert got.e2el_ms == 94.0
    assert got.completion_tokens == 4
    assert got.stages_ms == {
        "queue": 0.0,
        "preprocess": 3.0,
        "vision_encode": 50.0,
        "prefill": 20.0,
        "decode": 21.0,
        "detokenize": 0.0,
    }


def test_spans_tile_the_request() -> None:
    engine, _, _ = fake("some answer", prepare_ns=3, encode_ns=5, prefill_ns=7, step_ns=11)
    with engine:
        done = last(run(engine))
    assert done.spans[0].start_ns == done.received_ns
    assert all(a.end_ns == b.start_ns for a, b in zip(done.spans, done.spans[1:], strict=False))
    assert sum(s.tokens for s in done.spans if s.stage == "decode") == done.usage.completion_tokens - 1


def test_events_come_in_order_and_early_stages_are_announced() -> None:
    engine, backend, _ = fake("ok")
    with engine:
        events = run(engine)
    kinds = [event.stage if isinstance(event, Span) else type(event).__name__ for event in events]
    assert kinds == ["queue", "preprocess", "vision_encode", "prefill", "Token", "Token", "Token", "Done"]
    assert backend.calls == ["prepare", "encode", "sync", "prefill", "step", "step"]
    assert backend.closed


def test_usage_counts_token_ids() -> None:
    engine, _, _ = fake("é")
    with engine:
        events = run(engine, "hi")
    usage = last(events).usage
    assert (usage.prompt_tokens, usage.image_tokens) == (IMAGE_TOKENS + 3, IMAGE_TOKENS)
    assert (usage.cached_tokens, usage.completion_tokens) == (0, 3)
    assert [e.id for e in events if isinstance(e, Token)] == [*"é".encode(), END]


def test_text_only_request_skips_the_vision_tower() -> None:
    engine, backend, _ = fake("x")
    with engine:
        done = last(engine.generate([question("hi")]))
    assert "encode" not in backend.calls
    assert "vision_encode" not in timing([done]).stages_ms


def test_encoded_images_are_decoded_inside_the_request() -> None:
    import io

    buffer = io.BytesIO()
    Pillow.new("RGB", (9, 9)).save(buffer, "PNG")
    engine, _, _ = fake("x")
    with engine:
        done = last(engine.generate([question("hi", EncodedImage(buffer.getvalue()))]))
    assert [span.stage for span in done.spans][:3] == ["queue", "image_decode", "preprocess"]


def test_emoji_split_over_tokens_appears_whole() -> None:
    engine, _, _ = fake("a😀ñ")
    with engine:
        events = run(engine)
    texts = [event.text for event in events if isinstance(event, Token)]
    assert texts == ["a", "", "", "", "😀", "", "ñ", ""]
    assert last(events).text == "a😀ñ"


def test_answer_cut_inside_a_character_ends_with_a_replacement() -> None:
    engine, _, _ = fake("a😀")
    with engine:
        events = run(engine, sampling=Sampling(max_new_tokens=3))
    assert last(events).text == "a\ufffd"
    assert last(events).finish == "length"


def test_stop_string_across_tokens_is_never_shown() -> None:
    engine, backend, _ = fake("one STOP two")
    with engine:
        events = run(engine, sampling=Sampling(stop=("nothing", " STOP")))
    shown = "".join(event.text for event in events if isinstance(event, Token))
    assert shown == last(events).text == "one"
    assert last(events).finish == "stop"
    assert backend.calls.count("step") == len("one STOP") - 1


def test_half_a_stop_string_is_given_out_at_the_end() -> None:
    engine, _, _ = fake("wait ST")
    with engine:
        done = last(run(engine, sampling=Sampling(stop=("STOP",))))
    assert done.text == "wait ST"


def test_ignore_eos_gives_exactly_the_length_asked_for() -> None:
    engine, _, _ = fake("ab")
    with engine:
        done = last(run(engine, sampling=Sampling(max_new_tokens=9, ignore_eos=True)))
    assert (done.usage.completion_tokens, done.finish) == (9, "length")


def test_answer_stops_where_the_context_ends() -> None:
    engine, _, _ = fake("abcdefgh", context_length=10)
    with engine:
        done = last(run(engine, "hi", Sampling(max_new_tokens=50)))
    assert (done.text, done.finish) == ("abc", "length")


def test_complete_gives_the_events_of_generate() -> None:
    engine, backend, _ = fake("abc")
    with engine:
        streamed, complete = run(engine, reuse="none"), engine.complete([question("hi", picture())], reuse="none")
        assert complete == streamed
        assert last(engine.complete([question("hi")], Sampling(stop=("c",)), deadline_s=9)).text == "ab"
        backend.script = FakeScript(fail_at="step")
        with pytest.raises(RuntimeError, match="scripted failure"):
            engine.complete([question("hi")])
