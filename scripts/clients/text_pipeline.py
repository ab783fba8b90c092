"""`pipeline`, without and with this package: the text is what `generate` writes."""

from checks import NEW_TOKENS, PROMPTS, TEXTS, Check, continued, load, run
from transformers import pipeline


def check(folder, scratch):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}

    def write(writer):
        return [writer(prompt, **settings)[0]["generated_text"] for prompt in PROMPTS]

    # Before anything imports the package, which would then be what is loaded.
    stranger = pipeline("text-generation", str(folder), trust_remote_code=True)
    if not type(stranger.model).__module__.startswith("transformers_modules."):
        raise RuntimeError("the package was imported already")
    alone = write(stranger)
    model, tokenizer = load(folder)
    expected = [continued(model, tokenizer, prompt) for prompt in PROMPTS]
    for what, texts in (
        ("without rezero_hf (trust_remote_code=True), text beside `generate`'s", alone),
        ("with rezero_hf, text beside `generate`'s", write(pipeline("text-generation", str(folder)))),
    ):
        yield Check(what, sum(text != other for text, other in zip(texts, expected, strict=True)), 0, TEXTS)


if __name__ == "__main__":
    run(check)
