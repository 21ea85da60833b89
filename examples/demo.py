"""A dozen questions, one long system prompt, one batch: what comes out, and what it took.

make demo, or: python examples/demo.py
"""

from time import perf_counter

from nanovllm import LLM, SamplingParams
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import Executor
from nanovllm.core.plan import StepPlan, StepResult

SYSTEM_PROMPT = """\
You are a friendly and helpful assistant. Visitors of a small town library ask you questions,
about the library and about the world. Answer each question in one short and complete sentence.

How you answer:
- Use plain words that a child of ten understands.
- Be polite, be kind and be honest.
- Give the answer first. Do not repeat the question, do not make lists, and do not tell stories.
- If a question is about the world, or about science, animals, words or numbers, answer it from
  what you know.
- If a question is about the library, answer it from the facts below.

Facts about the library:
- The library is called Elm Street Library. It is at 12 Elm Street, next to the park.
- The library is open from 9 in the morning to 6 in the evening, from Monday to Saturday.
- The librarian is called Maria. She has worked here for twenty years and loves detective stories.
- A library card is free. To get one, bring a letter with your name and address.
- You can borrow up to ten books at a time, for three weeks. You can renew a book twice.
- A book that comes back late costs ten cents a day. Children never pay.
- There are eight computers on the first floor. They are free to use for one hour a day.
- Story time for children is on Wednesday at four in the afternoon, in the red room.
- The book club meets on the first Thursday of each month, at seven in the evening.
- Dogs must wait outside, except guide dogs. Food is not allowed, but water is fine.
"""
QUESTIONS = """\
What is the capital of France?
What is the capital of Japan?
What is the largest ocean on Earth?
Where is the library?
What is the name of the librarian?
How many books can I borrow?
How many legs does a spider have?
What do bees make?
What is the chemical symbol for water?
What is the opposite of hot?
What is a noun?
How many days are in a week?
""".splitlines()


class Stopwatch:
    """An executor that hands each plan on to the real one, and notes what the step took.

    steps: (tokens computed, whether some were of prompts, blocks in use, seconds) of each.
    """

    def __init__(self, executor: Executor, blocks: BlockManager) -> None:
        self.executor, self.blocks = executor, blocks
        self.steps: list[tuple[int, bool, int, float]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        counts, start = plan.num_scheduled_tokens, perf_counter()
        result = self.executor.execute(plan)
        seconds = perf_counter() - start
        used = round(self.blocks.usage * self.blocks.num_blocks)
        self.steps.append((sum(counts), max(counts) > 1, used, seconds))
        return result

    def close(self) -> None:
        self.executor.close()


def speed(steps: list[tuple[int, bool, int, float]], *, prefill: bool) -> str:
    """Tokens a second of the steps with prompt tokens in them, or of the others."""
    chosen = [(step[0], step[3]) for step in steps if step[1] == prefill]
    tokens, seconds = (sum(column) for column in zip(*chosen, strict=True))
    return f"{tokens / seconds:,.0f} tok/s   ({tokens:,} tokens, steps: {len(chosen)})"


def main() -> None:
    system = {"role": "system", "content": SYSTEM_PROMPT}
    chats = [[system, {"role": "user", "content": question}] for question in QUESTIONS]
    print("Loading SmolLM2-135M-Instruct ...", flush=True)
    with LLM("smollm2-135m") as llm:
        llm.generate("Hello", use_tqdm=False)  # compiles the kernels
        core = llm.engine.core
        core.executor = watch = Stopwatch(core.executor, core.scheduler.blocks)
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=64))
        preemptions = llm.get_metrics()["num_preemptions_total"]

    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"\n  {question}\n    {output.outputs[0].text}")
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_cached_tokens = sum(output.num_cached_tokens for output in outputs)
    ttft_s = sum(output.timing.ttft_s or 0 for output in outputs) / len(outputs)
    peak = max(used for _, _, used, _ in watch.steps)
    print(f"""
  prompt tokens   {num_prompt_tokens:,}
  output tokens   {sum(len(output.outputs[0].token_ids) for output in outputs):,}
  prefill         {speed(watch.steps, prefill=True)}
  decode          {speed(watch.steps, prefill=False)}
  mean TTFT       {ttft_s * 1000:,.0f} ms
  prefix cache    {num_cached_tokens / num_prompt_tokens:.0%} hits   ({num_cached_tokens:,} tokens)
  blocks used     {peak} of {watch.blocks.num_blocks:,} at the peak
  preemptions     {preemptions:.0f}""")


if __name__ == "__main__":
    main()
