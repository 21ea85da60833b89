"""Chat templates in a child process: right when all is well, and one failure a bad template."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from subprocess import PIPE, Popen, check_output
from typing import Any

import pytest

from nanovllm.chat import render_chat
from nanovllm.errors import InvalidRequestError, TemplateError
from nanovllm.server import render as child
from nanovllm.server.templates import Templates
from nanovllm.tokenizer import Tokenizer

HI = {"role": "user", "content": "Hé, «you» 🙂 \x00"}
CONFIG = {
    "chat_template": "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{{ tools | tojson }}{{ add_generation_prompt }}{{ mood }}",
    "bos_token": {"content": "<s>"},
    "model_max_length": 10**30,
}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = [
    LOOP,
    "{{ 10 ** (10 ** 10) > 1 }}",
]
HUGE = [
    "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}"
    "{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 'a'.ljust(2 ** 40) }}",
]

PARENT = """
import asyncio
from nanovllm.server.templates import Templates

async def main():
    templates = Templates({"chat_template": "rendered"})
    print(await templates.render([{}]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

Use = Callable[[Templates], Awaitable[None]]
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


def use(do: Use, *, deadline_s: float = 5.0, config: Any = CONFIG) -> None:
    """Give `do` a `Templates`, close it, and hold that no process is left."""

    async def run() -> None:
        templates = Templates(config, deadline_s=deadline_s)
        try:
            await do(templates)
        finally:
            pid = templates.child.pid if templates.child else None
            await templates.close()
        if pid is not None:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(run())


async def is_well(templates: Templates) -> None:
    assert await templates.render([HI], tools=[]) == render_chat(CONFIG, [HI], tools=[])


# What it renders


def test_it_renders_what_render_chat_does() -> None:
    async def do(templates: Templates) -> None:
        for names in ({}, {"mood": "glad"}, {"tools": [{"type": "function"}]}):
            text = await templates.render([HI, HI], add_generation_prompt=False, **names)
            assert text == render_chat(CONFIG, [HI, HI], add_generation_prompt=False, **names)
        assert await templates.render([HI], chat_template="{{ messages[0].role }}") == "user"

    use(do)


def test_it_renders_the_template_of_a_real_model(smollm2: Path) -> None:
    config = Tokenizer(smollm2).config

    async def do(templates: Templates) -> None:
        assert await templates.render([HI]) == render_chat(config, [HI])

    use(do, config=config)


def test_names_that_the_code_uses_itself_are_names_like_any() -> None:
    async def do(templates: Templates) -> None:
        text = "{{ config }} {{ deadline_s }}"
        names = {"config": 1, "deadline_s": 2}
        assert await templates.render([HI], chat_template=text, **names) == "1 2"
        with pytest.raises(InvalidRequestError):
            await templates.render([HI], **{"messages": [], "self": 3})
        await is_well(templates)

    use(do)


def test_fifty_at_once_get_their_own_answers() -> None:
    async def do(templates: Templates) -> None:
        messages = [{"role": "user", "content": str(i) * 1000 * i} for i in range(50)]
        texts = await asyncio.gather(*(templates.render([m]) for m in messages))
        assert texts == [render_chat(CONFIG, [m]) for m in messages]

    use(do)


# What is refused


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('No!') }}", "{{ a.b.c }}", "{% for %}", "{{ 1 / 0 }}", r"{{ '\ud83d' }}"],
)
def test_a_template_that_refuses_is_an_invalid_request(template: str) -> None:
    async def do(templates: Templates) -> None:
        with pytest.raises(InvalidRequestError, match="template") as found:
            await templates.render([HI], chat_template=template)
        assert found.value.field == "messages"
        started = templates.child
        await is_well(templates)
        assert templates.child is started

    use(do)


@pytest.mark.parametrize("value", ["\ud83d", b"", object()], ids=lambda value: type(value).__name__)
def test_what_is_no_text_is_an_invalid_request(value: Any) -> None:
    async def do(templates: Templates) -> None:
        with pytest.raises(InvalidRequestError, match="Unicode"):
            await templates.render([{"role": "user", "content": value}])
        with pytest.raises(InvalidRequestError, match="Unicode"):
            await templates.render([HI], mood=value)
        await is_well(templates)

    use(do)


def test_a_model_without_a_template_asks_for_one() -> None:
    async def do(templates: Templates) -> None:
        with pytest.raises(InvalidRequestError) as found:
            await templates.render([HI])
        assert str(found.value) == "chat_template=None: the model has none; give one"

    use(do, config={})


def test_a_prompt_has_a_largest_size() -> None:
    async def do(templates: Templates) -> None:
        most = child.MAX_TEXT_BYTES
        text = await templates.render([HI], chat_template=f"{{{{ 'é' * {most // 2} }}}}")
        assert text == "é" * (most // 2)
        with pytest.raises(InvalidRequestError, match="more than 16777216 bytes"):
            await templates.render([HI], chat_template=f"{{{{ 'é' * {most // 2 + 1} }}}}")

    use(do)


# What goes wrong


@pytest.mark.parametrize("template", ENDLESS, ids=["loops", "a power"])
def test_a_template_without_end_fails_alone(template: str) -> None:
    async def do(templates: Templates) -> None:
        bad = asyncio.ensure_future(templates.render([HI], chat_template=template))
        behind = [asyncio.ensure_future(is_well(templates)) for _ in range(5)]
        with pytest.raises(TemplateError, match=r"took more than 0\.3 s"):
            await bad
        await asyncio.gather(*behind)

    use(do, deadline_s=0.3)


@linux
@pytest.mark.parametrize("template", HUGE, ids=["doubles", "text", "list", "padding"])
def test_a_template_that_grows_fails_alone(template: str) -> None:
    async def do(templates: Templates) -> None:
        bad = asyncio.ensure_future(templates.render([HI], chat_template=template))
        behind = [asyncio.ensure_future(is_well(templates)) for _ in range(5)]
        with pytest.raises(TemplateError, match="memory"):
            await bad
        await asyncio.gather(*behind)

    use(do)


@linux
def test_nothing_is_left_of_bad_templates() -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        num_files = len(os.listdir("/proc/self/fd"))
        for template in (LOOP, HUGE[0]) * 2:
            with pytest.raises(TemplateError):
                await templates.render([HI], chat_template=template)
        for _ in range(1000):
            await is_well(templates)
        assert len(os.listdir("/proc/self/fd")) == num_files

    use(do, deadline_s=0.5)


def test_a_child_killed_while_it_waits_is_replaced() -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        assert templates.child is not None
        os.kill(templates.child.pid, signal.SIGKILL)
        await templates.child.wait()
        await is_well(templates)

    use(do)


def test_a_child_killed_at_work_fails_one() -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        assert templates.child is not None
        bad = asyncio.ensure_future(templates.render([HI], chat_template=LOOP))
        behind = asyncio.ensure_future(is_well(templates))
        await asyncio.sleep(0)  # let it begin
        os.kill(templates.child.pid, signal.SIGKILL)
        with pytest.raises(TemplateError, match="died"):
            await bad
        await behind

    use(do)


def test_a_child_that_is_stopped_fails_one() -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        assert templates.child is not None
        os.kill(templates.child.pid, signal.SIGSTOP)
        with pytest.raises(TemplateError, match="took more"):
            await is_well(templates)
        await is_well(templates)

    use(do, deadline_s=0.3)


@pytest.mark.parametrize("template", [None, LOOP], ids=["soon", "never"])
def test_a_caller_that_leaves_takes_no_answer_of_another(template: str | None) -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        for num_turns in range(8):  # at work, waiting for its turn
            left = [
                asyncio.ensure_future(templates.render([HI], chat_template=template, mood=i))
                for i in range(3)
            ]
            behind = asyncio.ensure_future(is_well(templates))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await behind

    use(do)


def test_closing_ends_what_is_under_way_and_what_comes() -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        tasks = [asyncio.ensure_future(templates.render([HI], chat_template=LOOP)) for _ in "123"]
        await asyncio.sleep(0)
        await templates.close()
        for task in tasks:
            with pytest.raises(TemplateError):
                await task
        with pytest.raises(TemplateError, match="closing"):
            await is_well(templates)
        await templates.close()

    use(do, deadline_s=60)


# The child itself


def test_it_ends_with_its_input_and_not_by_control_c() -> None:
    async def do(templates: Templates) -> None:
        await is_well(templates)
        process = templates.child
        assert process is not None and process.stdin is not None
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
        await is_well(templates)
        assert templates.child is process
        process.stdin.close()
        assert await process.wait() == 0

    use(do)


def test_it_dies_with_its_parent_however_that_ends() -> None:
    with Popen([sys.executable, "-c", PARENT], stdout=PIPE, stderr=PIPE) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        assert parent.stdout.readline() == b"rendered\n"
        parent.kill()
        assert parent.stderr.read() == b""  # ends when nobody holds it: the child does


@linux
def test_a_child_at_work_that_lost_its_parent_ends_by_itself() -> None:
    """Nobody kills it, as when the parent was killed."""

    async def do(templates: Templates) -> None:
        templates.settings["deadline_s"] = -0.9
        await is_well(templates)
        process = templates.child
        assert process is not None
        with pytest.raises(TemplateError, match="died"):
            await templates.render([HI], chat_template=LOOP)
        assert await process.wait() == -signal.SIGALRM

    use(do, deadline_s=60)


def test_it_loads_neither_torch_nor_a_model() -> None:
    code = "import nanovllm.server.render, sys; print({'torch', 'numpy'} & set(sys.modules))"
    assert check_output([sys.executable, "-c", code]) == b"set()\n"


def test_uvloop_runs_it_too() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def do() -> None:
        templates = Templates(CONFIG, deadline_s=0.3)
        await is_well(templates)
        with pytest.raises(TemplateError):
            await templates.render([HI], chat_template=LOOP)
        await is_well(templates)
        assert templates.child is not None
        pid = templates.child.pid
        await templates.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(do())
