"""Image and prefix caches: what is taken over, what is not, and that nobody sees another's picture."""

from __future__ import annotations

import hashlib
import io
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from runtime import cache
from runtime.api import Done, EncodedImage, Event, Failed, Image, Message, Sampling, Span
from runtime.backend_fake import IMAGE_TOKENS, FakeBackend, FakeScript
from runtime.cache import Context, ImageCache
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.images import answer, from_pillow, question
from runtime.latency import timing
from vlm.errors import UserError

MS = 1_000_000


def fake(reply: Any = "abc", limit: int = 1 << 20, chunk: int = 512, **script: Any) -> tuple[Engine, FakeBackend]:
    clock = VirtualClock()
    backend = FakeBackend(FakeScript(reply=reply, clock=clock, **script))
    return Engine(backend, clock, 64, image_cache_bytes=limit, prefill_chunk=chunk), backend


def picture(value: int = 0, x: int = 0) -> Image:
    image = Pillow.new("RGB", (6, 4), (9, 1, 2))
    image.putpixel((x, 0), (value % 256, value // 256, 3))
    return from_pillow(image)


def png(value: int = 0) -> EncodedImage:
    buffer = io.BytesIO()
    Pillow.fromarray(picture(value).rgb).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue())


def done(engine: Engine, *messages: Message, **options: Any) -> Done:
    *_, last = engine.generate(messages, Sampling(max_new_tokens=8), **options)
    assert isinstance(last, Done)
    return last


def prompt_length(*texts: str, images: int = 0) -> int:
    return sum(len(text.encode()) for text in texts) + images * IMAGE_TOKENS


def test_second_question_computes_only_what_is_new() -> None:
    engine, backend = fake("abc", prefill_token_ns=MS, encode_ns=50 * MS)
    with engine:
        first = done(engine, question("one?", picture()))
        second = done(engine, question("one?", picture()), answer("abc"), question("two?"))
    assert (first.usage.cached_tokens, first.usage.cached_images) == (0, 0)
    # the question, the picture and all tokens of the answer but the last, which no step took in
    assert second.usage.cached_tokens == prompt_length("\none?", "abc", images=1)
    assert second.usage.cached_images == 1
    assert timing([first]).e2el_ms == 50 + prompt_length("\none?", images=1)
    assert timing([second]).e2el_ms == len("two?")
    assert backend.calls.count("encode") == 1
    vision = [span for span in second.spans if span.stage == "vision_encode"]
    assert [(span.cached, span.tokens) for span in vision] == [(True, 0)]
    prefill = [span for span in second.spans if span.stage == "prefill"]
    assert [(span.tokens, span.cached_tokens) for span in prefill] == [(4, second.usage.cached_tokens)]


def test_an_image_is_found_again_behind_another_beginning() -> None:
    engine, backend = fake()
    with engine:
        done(engine, question("one?", picture()))
        got = done(engine, Message("system", ("Be brief.",)), question("one?", picture()))
    assert (got.usage.cached_tokens, got.usage.cached_images) == (0, 1)
    assert backend.calls.count("encode") == 1


@pytest.mark.parametrize("x", range(6))
def test_one_changed_pixel_misses_both_caches(x: int) -> None:
    engine, backend = fake()
    with engine:
        done(engine, question("one?", picture(0)))
        got = done(engine, question("one?", picture(1, x)))
    assert (got.usage.cached_tokens, got.usage.cached_images) == (0, 0)
    assert backend.calls.count("encode") == 2


def test_reuse_none_computes_everything_and_leaves_nothing() -> None:
    engine, backend = fake()
    with engine:
        for _ in range(3):
            got = done(engine, question("one?", picture(), picture()), reuse="none")
            assert (got.usage.cached_tokens, got.usage.cached_images) == (0, 0)
        assert engine.stats.images.entries == 0
        images = done(engine, question("one?", picture()), reuse="images")
        again = done(engine, question("one?", picture()), reuse="images")
    assert (images.usage.cached_images, again.usage.cached_images, again.usage.cached_tokens) == (0, 1, 0)
    assert backend.calls.count("encode") == 3 * 2 + 1


def test_the_same_picture_twice_in_a_request_is_encoded_once() -> None:
    engine, _ = fake(encode_ns=10 * MS)
    with engine:
        got = done(engine, question("same?", picture(), picture(1), picture()))
    assert timing([got]).stages_ms["vision_encode"] == 20.0
    assert got.usage.cached_images == 1


def test_a_file_sent_again_is_not_decoded_again() -> None:
    engine, _ = fake()
    with engine:
        first, second = done(engine, question("a", png())), done(engine, question("b", png()))
        third = done(engine, question("c", png(1)))
    cached = [[s.cached for s in got.spans if s.stage == "image_decode"] for got in (first, second, third)]
    assert cached == [[False], [True], [False]]


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    size = 64  # bytes of the scripted embedding: a digest
    engine, _ = fake(limit=3 * size)
    with engine:
        for value in (0, 1, 2, 0, 3):
            done(engine, question("a", picture(value)), reuse="images")
        stats = engine.stats.images
        assert (stats.entries, stats.bytes, stats.hits, stats.misses) == (3, 3 * size, 1, 4)
        assert done(engine, question("a", picture(0)), reuse="images").usage.cached_images == 1
        assert done(engine, question("a", picture(1)), reuse="images").usage.cached_images == 0


def test_an_embedding_larger_than_the_cache_is_not_kept() -> None:
    engine, _ = fake(limit=10)
    with engine:
        done(engine, question("a", png()))
        got = done(engine, question("b", png()), reuse="images")
    assert engine.stats.images.entries == 0
    assert got.usage.cached_images == 0


def test_a_different_preprocessing_is_a_different_key() -> None:
    cache = ImageCache(1 << 20, "a")
    cache.put("digest", np.zeros(4, np.float32))
    other = ImageCache(1 << 20, "b")
    other._entries = cache._entries
    assert "digest" in cache
    assert "digest" not in other


def test_a_hundred_interleaved_requests_of_two_people_see_their_own_pictures() -> None:
    def what_it_sees(messages: Any) -> str:
        return next(p.digest[:8] for m in messages for p in m.content if isinstance(p, Image))

    engine, _ = fake(what_it_sees)
    faults: list[str] = []

    def ask(person: int) -> None:
        history: list[Message] = []
        for turn in range(50):
            mine = picture(1000 * person + turn // 10)
            history = [] if turn % 10 == 0 else history
            history.append(question("what?", mine) if not history else question(f"and {turn}?"))
            got = done(engine, *history)
            history.append(answer(got.text))
            if got.text != mine.digest[:8]:
                faults.append(f"person {person}, turn {turn}: {got.text}")

    with engine:
        people = [threading.Thread(target=ask, args=(person,)) for person in range(2)]
        for person in people:
            person.start()
        for person in people:
            person.join(60)
    assert faults == []


@pytest.mark.parametrize("step", ["encode", "prefill", "step"])
def test_a_failure_leaves_no_context_behind(step: str) -> None:
    engine, backend = fake("abc", fail_at=step)
    with engine:
        with pytest.raises(RuntimeError):
            done(engine, question("one?", picture()))
        backend.script = FakeScript(reply="fine")
        got = done(engine, question("one?", picture()))
    assert (got.text, got.usage.cached_tokens) == ("fine", 0)


def test_cancel_stops_between_two_chunks_of_a_prefill_and_the_next_request_is_right() -> None:
    cancel, finished = threading.Event(), threading.Event()
    events: list[Event | Failed] = []
    engine, backend = fake("abc", chunk=10)
    inner = backend.prefill

    def prefill(*arguments: Any) -> Any:
        if backend.calls.count("prefill") == 2:
            cancel.set()
        return inner(*arguments)

    backend.prefill = prefill  # type: ignore[method-assign]

    def listen(event: Event | Failed) -> None:
        events.append(event)
        if isinstance(event, Done | Failed):
            finished.set()

    with engine:
        engine.submit([question("x" * 95)], listener=listen, cancel=cancel)
        assert finished.wait(60)
        assert backend.calls.count("prefill") == 3
        last = events[-1]
        assert isinstance(last, Done)
        assert (last.finish, last.text) == ("cancelled", "")
        assert [span.tokens for span in last.spans if span.stage == "prefill"] == [10, 10, 10]
        again = done(engine, question("x" * 95))
    assert (again.text, again.usage.cached_tokens) == ("abc", 30), "what was computed before the stop counts"


def test_prefill_spans_add_up_to_the_tokens_computed() -> None:
    engine, _ = fake("abc", chunk=7)
    with engine:
        for text in ("1234567", "x" * 20, "x" * 50):
            got = done(engine, question(text))
            spans = [span for span in got.spans if span.stage == "prefill"]
            assert got.usage.prompt_tokens is not None
            assert got.usage.cached_tokens is not None
            assert sum(s.tokens for s in spans) == got.usage.prompt_tokens - got.usage.cached_tokens


def test_one_token_is_always_left_to_compute() -> None:
    context = Context()
    context.add([1, 2, 3])
    assert [context.shared(keys) for keys in ([1, 2, 3], [1, 2, 3, 4], [1, 5, 3, 4], [9], [1])] == [2, 3, 1, 0, 0]


part = st.one_of(st.text("ab", min_size=1, max_size=3), st.integers(0, 2).map(picture))
user = st.lists(part, min_size=1, max_size=3).map(lambda parts: Message("user", tuple(parts)))
turns = st.lists(st.tuples(user, st.text("ab", min_size=1, max_size=3).map(answer)), max_size=2)
conversation = st.builds(lambda history, last: [*(message for turn in history for message in turn), last], turns, user)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(conversation, st.sampled_from(["none", "images", "all"])), min_size=2, max_size=8),
    st.integers(1, 9),
    st.sampled_from([0, 100, 1 << 20]),
)
def test_caches_never_change_an_answer(requests: Any, chunk: int, limit: int) -> None:
    """The scripted backend refuses a context or an embedding that is not this request's."""

    def echo(messages: Any) -> str:
        return "".join(p if isinstance(p, str) else p.digest[:2] for m in messages for p in m.content)[-6:]

    engine, _ = fake(echo, limit=limit, chunk=chunk)
    with engine:
        for messages, reuse in requests:
            assert done(engine, *messages, reuse=reuse).text == echo(messages)


def test_a_backend_without_grammars_says_so() -> None:
    engine, _ = fake()
    with engine, pytest.raises(UserError, match="backend fake cannot hold answers"):
        list(engine.generate([question("hi")], Sampling(json_schema="{}")))


def test_warm_up_takes_the_image_path_and_leaves_the_caches_alone() -> None:
    engine, backend = fake("abcdefgh", encode_ns=5 * MS, prefill_ns=2 * MS)
    with engine:
        got = engine.warmup(3)
        assert (got.cold_ttft_ms, got.warm_ttft_ms) == (7.0, 7.0)
        assert engine.stats.images.entries == 0
    assert backend.calls.count("encode") == 3


def test_stage_sync_waits_at_every_border() -> None:
    backend = FakeBackend(FakeScript(reply="ab"))
    with Engine(backend) as engine:
        got = done(engine, question("hi", picture()), sync="all")
    assert backend.calls == ["prepare", "encode", "sync", "prefill", "sync", "step", "sync", "step", "sync"]
    assert isinstance(got.spans[0], Span)


def test_files_are_known_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageCache(1 << 20, "p")
    images.put("content", np.zeros(4, np.uint8))
    large = b"x" * (cache.SMALL_FILE + 1)
    for file in (b"small", large):
        images.remember(file, "content")
        assert images.digest_of(file) == "content"
    for name in (hashlib.sha256(large).digest(), hashlib.sha256(large).hexdigest().encode()):
        assert images.digest_of(name) is None, "somebody sent the name of a file instead of the file"
    monkeypatch.setattr(cache, "SMALL_FILES_BYTES", 25_000)
    files = [bytes([n]) * 10_000 for n in range(3)]
    for file in (*files, files[2]):
        images.remember(file, "content")
    assert [images.digest_of(file) for file in files] == [None, "content", "content"]
