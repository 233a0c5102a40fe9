"""``capo chat`` as people use it: a process, with pipes or with a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from capo.chat import Pace
from capo.client import ChatPiece
from registry import Registry
from serve.engine_api import Call
from tests.serve.fake_engine import FakeEngine
from tests.serve.grpc_channel import Faces, both_faces
from tests.serve.running import BASE, eventually, publish

# In a process of its own, because a terminal of one's own needs a session of one's own.
# Ctrl-C must reach the program even where the tests run in the background, which makes shells ignore it for children.
IN_A_TERMINAL = (
    "import pty, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); pty.spawn(sys.argv[1:])"
)


class RememberingEngine(FakeEngine):
    def __init__(self, *, num_tokens: int = 3) -> None:
        super().__init__(num_tokens=num_tokens)
        self.calls: list[Call] = []

    def _tokens(self, call: Call) -> AsyncIterator[str]:
        self.calls.append(call)
        return super()._tokens(call)

    def turns(self) -> list[tuple[str, str]]:
        """The conversation that the last call brought."""
        return [(message["role"], message["content"]) for message in self.calls[-1].body["messages"]]


async def run_chat(faces: Faces, *arguments: str, typed: str | None = None) -> tuple[int, str, str]:
    """``capo chat`` with pipes: its exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "capo", "chat", "--address", faces.address, *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, error = await asyncio.wait_for(process.communicate((typed or "").encode()), 30)
    assert process.returncode is not None
    return process.returncode, output.decode(), error.decode()


class Terminal:
    """``capo chat`` in a terminal of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.shown = ""

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())

    async def wait_for(self, pattern: str, seconds: float = 20) -> str:
        """Read on until ``pattern`` is shown; returns what was shown until then, and forgets it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            while (found := re.search(pattern, self.shown)) is None:
                more = await self.process.stdout.read(4096)
                assert more, f"it ended without showing {pattern!r}: {self.shown!r}"
                self.shown += more.decode(errors="replace")
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown


@contextlib.asynccontextmanager
async def terminal(faces: Faces, *arguments: str) -> AsyncIterator[Terminal]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", IN_A_TERMINAL, sys.executable, "-m", "capo", "chat", "--address", faces.address,
        *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    opened = Terminal(process)
    try:
        await opened.wait_for("> ")
        yield opened
        opened.type("\n/quit\n")  # a whole line, which is read whether or not the prompt is up yet
        await asyncio.wait_for(process.wait(), 10)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_message_is_answered_once_with_nothing_else_on_standard_output(tmp_path: Path) -> None:
    engine = RememberingEngine()
    artifact = publish(Registry(tmp_path), "support", alias="help")
    async with both_faces(engine, tmp_path) as faces:
        options = ("--system", "Be brief.", "--temperature", "0", "--max-tokens", "9", "--seed", "4")
        code, output, error = await run_chat(faces, "--model", "help", "--message", "hello", *options)
        assert (code, output, error) == (0, f"{artifact.revision} " * 3 + "\n", "")
        assert engine.turns() == [("system", "Be brief."), ("user", "hello")]
        body = engine.calls[0].body
        assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 9, 4)


async def test_a_question_on_standard_input_goes_to_the_base_model_by_default(tmp_path: Path) -> None:
    engine = RememberingEngine()
    async with both_faces(engine, tmp_path) as faces:
        code, output, _ = await run_chat(faces, typed="two\nlines\n")
        assert (code, output) == (0, "base base base \n")
        assert engine.turns() == [("user", "two\nlines")]
        assert engine.calls[0].body["model"] == BASE


async def test_a_failure_is_one_line_on_standard_error_and_a_code_that_is_not_zero(tmp_path: Path) -> None:
    async with both_faces(FakeEngine(), tmp_path) as faces:
        for arguments, says in (
            (("--model", "nope", "--message", "hi"), "nope"),
            (("--message", ""), "no question"),
            (("--address", "127.0.0.1:1", "--message", "hi"), "capo serve"),
        ):
            code, output, error = await run_chat(faces, *arguments)
            assert (code, output) == (2, "")
            assert error.startswith("error: ")
            assert says in " ".join(error.split())
            assert "Traceback" not in error


async def test_a_conversation_goes_on_and_tells_how_quickly_it_was_answered(tmp_path: Path) -> None:
    engine = RememberingEngine()
    async with both_faces(engine, tmp_path) as faces, terminal(faces) as shell:
        shell.type("hello\n")
        assert "base base base" in await shell.wait_for(r"3 tokens, first after [0-9.]+ s.*tokens/s")
        await shell.wait_for("> ")
        shell.type("and now?\n")
        await shell.wait_for("tokens/s")
        assert engine.turns() == [("user", "hello"), ("assistant", "base base base "), ("user", "and now?")]
        shell.type("/reset\n")
        await shell.wait_for("Forgotten")
        shell.type("again\n")
        await shell.wait_for("tokens/s")
        assert engine.turns() == [("user", "again")]
        shell.type("/quit\n")


async def test_models_are_listed_and_switched(tmp_path: Path) -> None:
    engine = RememberingEngine()
    artifact = publish(Registry(tmp_path), "support", alias="help")
    async with both_faces(engine, tmp_path) as faces, terminal(faces) as shell:
        shell.type("/models\n")
        listed = await shell.wait_for(f"help -> {artifact.revision}")
        assert f"{BASE} (base model)" in listed
        shell.type("/model help\n")
        await shell.wait_for("goes to help")
        shell.type("hello\n")
        assert artifact.revision in await shell.wait_for("tokens/s")
        shell.type("/nonsense\n")
        await shell.wait_for("There is no /nonsense")
        shell.type("/model nope\nhello\n")
        await shell.wait_for("nope.*does not exist|nope.*not|no.*nope")
        shell.type("/model help\nhello\n")
        await shell.wait_for("tokens/s")


async def clear_the_line(shell: Terminal) -> None:
    """Ctrl-C at the prompt. Pressed in the moment before readline waits for keys, it is noticed with the next one."""
    for _ in range(5):
        shell.type("\x03")
        with contextlib.suppress(TimeoutError):
            await shell.wait_for("> ", seconds=4)
            return
    raise AssertionError(f"no new prompt: {shell.shown!r}")


async def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    engine = RememberingEngine(num_tokens=2)
    async with both_faces(engine, tmp_path) as faces, terminal(faces) as shell:
        engine.answer_gate.clear()
        shell.type("hello\n")
        await eventually(lambda: engine.waiting == 1, seconds=10)
        shell.type("\x03")
        await shell.wait_for("stopped")
        await eventually(lambda: engine.waiting == 0, seconds=2)
        await shell.wait_for("> ")
        await clear_the_line(shell)
        engine.answer_gate.set()
        shell.type("still there?\n")
        assert "base base" in await shell.wait_for("tokens/s")
        assert engine.turns() == [("user", "still there?")]
        await shell.wait_for("> ")
        shell.type("\x04")
        await asyncio.wait_for(shell.process.wait(), 10)


async def test_a_models_text_cannot_command_the_terminal(tmp_path: Path) -> None:
    class Rogue(FakeEngine):
        async def _tokens(self, call: Call) -> AsyncIterator[str]:
            yield "\x1b]0;owned\x07 \x9b2J tab\there\n"

    async with both_faces(Rogue(), tmp_path) as faces, terminal(faces) as shell:
        shell.type("hello\n")
        shown = await shell.wait_for("token")
        assert "]0;owned 2J tab" in shown
        assert "\x1b]0" not in shown


async def test_it_starts_in_well_under_a_second_of_work() -> None:
    """Measured as work, because the machine that runs tests may be busy with other things."""
    heavy = ("vllm", "torch", "transformers", "fastapi", "uvicorn", "sqlalchemy", "openai", "numpy")
    script = (
        f"import sys, time, capo.cli, capo.chat; print([m for m in {heavy!r} if m in sys.modules], time.process_time())"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, stderr=None
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    modules, seconds = output.decode().rsplit(maxsplit=1)
    assert modules == "[]"
    assert float(seconds) < 1.5


def test_the_pace_counts_from_the_question_and_between_tokens() -> None:
    def piece(num_tokens: int) -> ChatPiece:
        return ChatPiece(
            id="", model="", index=0, text="", reasoning="", tool_calls=(), finish_reason=None, stop_reason=None,
            num_tokens=num_tokens, logprobs=(), token_ids=(), prompt_token_ids=(), usage=None,
        )  # fmt: skip

    pace = Pace(time.monotonic())
    assert str(pace) == "no token came"
    for num_tokens in (1, 0, 4):
        pace.see(piece(num_tokens))
    pace.asked_at, pace.first_token_at, pace.last_token_at = 10.0, 10.5, 12.5
    assert str(pace) == "5 tokens, first after 0.50 s, 2.0 tokens/s"
