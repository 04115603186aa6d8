"""A script as people write them for nano-vLLM: chat prompts through the tokenizer, one set of parameters."""

from pathlib import Path

from transformers import AutoTokenizer

from baton_client import LLM, SamplingParams

QUESTIONS = ["Who are you?", "Which primes are below 30?"]


def main() -> None:
    """Ask the model in the usual place."""
    model = str(Path("~/huggingface/Qwen3-0.6B/").expanduser()) + "/"
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = LLM(model, enforce_eager=True, tensor_parallel_size=1)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=256))
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt!r}\nCompletion: {output['text']!r}\n")


if __name__ == "__main__":
    main()
