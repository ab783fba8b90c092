"""`generate` in the library's modes: whatever the way, the tokens are those of the plain greedy loop, or of the same seed."""

import pytest
import torch
from transformers import set_seed


STEPS = 10


@pytest.fixture(scope="module")
def model(tiny_model):
    """Large enough weights that greedy decoding does not fall into one token."""
    return tiny_model(
        initializer_range=0.2, embedding_std=0.2, embedding_multiplier=1, pad_token_id=257, eos_token_id=256
    )


@pytest.fixture
def greedy(model, ids):
    """The new tokens of a plain loop over whole sequences, without `generate` and without a cache: (rows, STEPS)."""
    text = ids
    with torch.no_grad():
        for _ in range(STEPS):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert len(text[:, ids.shape[1] :].unique()) > 4
    return text[:, ids.shape[1] :]


def generate(model, ids, **settings):
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def test_assisted_and_prompt_lookup_decoding_change_no_token(tiny_model, model, ids, greedy):
    """Guesses from a smaller model, or from the prompt itself, are only accepted where greedy decoding agrees."""
    draft = tiny_model(seed=1, num_hidden_layers=1, initializer_range=0.2, embedding_std=0.2, embedding_multiplier=1)
    for way in ({"assistant_model": model}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 2}):
        for row, expected in zip(ids, greedy, strict=True):
            assert torch.equal(generate(model, row[None], **way)[0, ids.shape[1] :], expected), way


def test_generation_from_embeddings(model, ids, greedy):
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    new = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False
    )
    assert torch.equal(new, greedy)


def test_a_cache_returned_by_generate_can_be_continued(model, ids, greedy):
    first = generate(model, ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    rest = generate(
        model,
        first.sequences,
        past_key_values=first.past_key_values,
        max_new_tokens=STEPS - 4,
        min_new_tokens=STEPS - 4,
    )
    assert torch.equal(rest[:, ids.shape[1] :], greedy)


def test_one_beam_is_greedy_and_more_are_at_least_as_likely(model, ids, greedy):
    def likelihood(text):
        with torch.no_grad():
            logits = model(text).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
        return logits.gather(-1, text[:, ids.shape[1] :, None]).sum((-1, -2))

    beams = generate(model, ids, num_beams=4, early_stopping=False)
    assert torch.equal(generate(model, ids, num_beams=1)[:, ids.shape[1] :], greedy)
    assert (likelihood(beams) >= likelihood(torch.cat([ids, greedy], dim=1)) - 1e-4).all()


def test_sampling_with_a_seed_repeats_and_does_not_depend_on_the_cache(model, ids):
    drawn = []
    for settings in ({"use_cache": True}, {"use_cache": False}, {"use_cache": True}):
        set_seed(3)
        drawn.append(generate(model, ids, do_sample=True, top_k=20, temperature=0.9, **settings))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    set_seed(4)
    assert not torch.equal(generate(model, ids, do_sample=True, top_k=20, temperature=0.9), drawn[0])


def test_generation_stops_at_the_end_of_text_and_pads(model, ids):
    """With the first greedy token of row 0 as end, row 0 stops at once and is filled with padding."""
    with torch.no_grad():
        end = model(ids).logits[0, -1].argmax().item()
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=257,
    )[0, ids.shape[1] :]
    assert new[0] == end and (new[1:] == 257).all()


def test_outputs_of_generation_hold_scores_hidden_states_and_attentions(model, ids):
    model.set_attn_implementation("eager")
    try:
        wanted = {"output_scores": True, "output_hidden_states": True, "output_attentions": True}
        output = generate(model, ids, return_dict_in_generate=True, **wanted)
    finally:
        model.set_attn_implementation("sdpa")
    layers = model.config.num_hidden_layers
    assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == STEPS
    assert len(output.hidden_states[0]) == layers + 1 and len(output.attentions[0]) == layers
    assert output.attentions[1][0].shape == (2, model.config.num_attention_heads, 1, ids.shape[1] + 1)


def test_continuous_batching_gives_each_prompt_its_own_greedy_tokens(model, ids, greedy):
    """Prompts in one paged batch, from a pool of a few pages: by default it takes most of the machine's memory."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=257, use_cache=False
    )
    prompts = [ids[0].tolist(), ids[1].tolist()]
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=pages, progress_bar=False
    )
    tokens = sorted(output.generated_tokens[:STEPS] for output in outputs.values())
    assert tokens == sorted(greedy.tolist())
