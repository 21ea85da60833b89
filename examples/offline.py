"""A script as for vLLM; only the import differs."""

from nanovllm import LLM, SamplingParams

prompts = ["The capital of France is", "The sun rises in the", "Water is made of"]
params = SamplingParams(temperature=0, max_tokens=16, stop=["\n"])

llm = LLM(model="smollm2-135m")
for output in llm.generate(prompts, params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
