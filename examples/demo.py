"""A dozen questions, one long system prompt, one batch: what comes out, and what it took.

make demo, or: python examples/demo.py
"""

from dataclasses import dataclass, field
from time import perf_counter

from nanovllm import LLM, SamplingParams
from nanovllm.core.engine import Executor
from nanovllm.core.plan import StepPlan, StepResult

SYSTEM_PROMPT = """\
You are a friendly and helpful assistant. Visitors of a small town library ask you questions,
about the library and about the world. Answer each question in one short and complete sentence.

How you answer:
- Use plain words that a child of ten understands.
- Be polite, be kind and be honest.
- Give the answer first. Do not repeat the question, do not make lists, and do not tell stories.
- If a question is about the world (geography, science, animals, words), say what you know.
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
Where is the library?
What is the name of the librarian?
What is the largest planet in the solar system?
What is the largest ocean on Earth?
How many legs does a spider have?
What is a noun?
What is gravity?
What is the opposite of hot?
What is the boiling point of water?
How many days are in a week?
""".splitlines()


@dataclass
class Stopwatch:
    """Stands between the engine and its executor, and notes what each step did.

    steps: (prompt tokens computed, output tokens sampled, blocks used, seconds)
    """

    llm: LLM
    inner: Executor
    steps: list[tuple[int, int, int, float]] = field(default_factory=list)

    def execute(self, plan: StepPlan) -> StepResult:
        start = perf_counter()
        result = self.inner.execute(plan)
        seconds = perf_counter() - start
        computed = sum(n for n in plan.num_scheduled_tokens if n > 1)
        blocks = self.llm.engine.core.scheduler.blocks
        used = round(blocks.usage * blocks.num_blocks)
        sampled = sum(token_id >= 0 for token_id in result.token_ids)
        self.steps.append((computed, sampled, used, seconds))
        return result

    def close(self) -> None:
        self.inner.close()


def main() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=64)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    with LLM("smollm2-135m") as llm:
        llm.generate("Hello", greedy, use_tqdm=False)  # compiles the kernels
        llm.engine.core.executor = watch = Stopwatch(llm, llm.engine.core.executor)
        answers = llm.chat(
            [[system, {"role": "user", "content": question}] for question in QUESTIONS], greedy
        )
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"\n  {question}\n    {answer.outputs[0].text}")
