"""A process with transformers and without OpenPaLM: loads exported folders and stores what it got.

    python transformers_only.py WORK

WORK/jobs.json: folder names of language models, of reward models, and conversations for the chat
template. Inputs are WORK/inputs.safetensors; results go to WORK/results.safetensors and
WORK/results.json.
"""

import json
import os
import sys
from pathlib import Path


class _Hidden:
    """Makes `import openpalm` fail, installed or not."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] == "openpalm":
            raise ModuleNotFoundError("this process has no OpenPaLM")


NEW_TOKENS = 24


def main(work: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    jobs = json.loads((work / "jobs.json").read_text(encoding="utf-8"))
    inputs = load_file(work / "inputs.safetensors")
    results: dict[str, torch.Tensor] = {}
    for name in jobs["language"]:
        found = language_model(work / name, inputs, generates=name not in jobs["encoders"])
        results |= {f"{name}/{key}": value.contiguous() for key, value in found.items()}
    for name in jobs["reward"]:
        found = reward_model(work / name, inputs)
        results |= {f"{name}/{key}": value.contiguous() for key, value in found.items()}
    save_file(results, work / "results.safetensors")
    rendered = {
        name: conversations(work / name, jobs["conversations"]) for name in jobs["templates"]
    }
    (work / "results.json").write_text(json.dumps(rendered), encoding="utf-8")
    assert not [name for name in sys.modules if name.partition(".")[0] == "openpalm"]


def language_model(folder: Path, inputs, *, generates: bool):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    vocab = model.config.vocab_size
    ids, short = inputs["ids"] % vocab, inputs["short"] % vocab
    found = {"logits": model(ids).logits.detach(), "loss": model(ids, labels=ids).loss.detach()}
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1
    trunk = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(trunk(ids).last_hidden_state, hidden[-1])
    half = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    ).eval()
    found["bfloat16"] = half(ids).logits.detach()

    # A batch of two lengths, padded on either side.
    time = ids.shape[1]
    row = torch.nn.functional.pad(short[0], (time - short.shape[1], 0))
    left, mask = torch.stack([ids[0], row]), torch.ones(2, time, dtype=torch.long)
    mask[1, : time - short.shape[1]] = 0
    found["left"] = model(left, attention_mask=mask).logits[1, -short.shape[1] :].detach()
    right = torch.stack([ids[0], row.roll(short.shape[1])])
    padded = model(right, attention_mask=mask.flip(1)).logits
    found["right"] = padded[1, : short.shape[1]].detach()
    found["short"] = model(short).logits[0].detach()

    if generates:
        found |= generated(model, ids, short, left, mask)
    found |= trained(model, ids)
    model.save_pretrained(folder.with_name(f"{folder.name}-saved"), max_shard_size="50KB")
    again = AutoModelForCausalLM.from_pretrained(
        folder.with_name(f"{folder.name}-saved"), trust_remote_code=True
    ).eval()
    found["saved"] = again(ids).logits.detach()
    return found


def generated(model, ids, short, left, mask):
    import torch

    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    greedy |= {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}
    ones = torch.ones_like(ids[:1])
    batch = model.generate(left, attention_mask=mask, **greedy)[:, left.shape[1] :]
    found = {
        "greedy": model.generate(ids[:1], attention_mask=ones, **greedy)[0, ids.shape[1] :],
        "greedy-short": model.generate(short, attention_mask=torch.ones_like(short), **greedy)[
            0, short.shape[1] :
        ],
        "greedy-left": batch,
    }
    for name, how in {
        "uncached": {"use_cache": False},
        "static": {"cache_implementation": "static"},
    }.items():
        found[name] = model.generate(left, attention_mask=mask, **greedy, **how)[:, left.shape[1] :]
    beams = [
        model.generate(left, attention_mask=mask, num_beams=3, use_cache=cached, **greedy)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    torch.manual_seed(0)
    # The folder's generation_config.json says how.
    sampled = model.generate(
        left, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    )
    found["sampled"] = sampled[:, left.shape[1] :]
    return found


def trained(model, ids):
    """Gradients with and without gradient checkpointing; the loss of a count of items."""
    import torch

    model.train()
    for block in model.model.blocks:
        block.dropout = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        items = torch.tensor(2 * (ids.numel() - len(ids)))
        model(ids, labels=ids, num_items_in_batch=items).loss.backward()
        weight = model.model.blocks[0].attention.q_proj.weight
        gradients.append(weight.grad.clone())
    model.gradient_checkpointing_disable()
    model.eval()
    return {"gradient": gradients[0], "recomputed": gradients[1]}


def reward_model(folder: Path, inputs):
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert model.config.num_labels == 1
    model.eval()
    ids = inputs["ids"] % model.config.vocab_size
    lengths, prompts = inputs["lengths"], inputs["prompt_lengths"]
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    plain = model(ids, attention_mask=mask)
    assert plain.logits.shape == (len(ids), 1)
    marked = model(ids, attention_mask=mask, prompt_lengths=prompts).logits
    left = torch.stack([row.roll(-int(n)) for row, n in zip(ids, lengths, strict=True)])
    shifted = model(left, attention_mask=mask.flip(1), prompt_lengths=prompts).logits
    loss = model(ids, attention_mask=mask, labels=inputs["lengths"].float()).loss
    return {
        "plain": plain.logits[:, 0].detach(),
        "marked": marked[:, 0].detach(),
        "left": shifted[:, 0].detach(),
        "loss": loss.detach(),
    }


def conversations(folder: Path, rows):
    """Token ids of each conversation, without and with a generation prompt; None if refused."""
    import jinja2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for messages in rows:
        try:
            found.append(
                [
                    tokenizer.apply_chat_template(
                        messages, add_generation_prompt=opened, tokenize=True, return_dict=False
                    )
                    for opened in (False, True)
                ]
            )
        except jinja2.TemplateError:
            found.append(None)
    text = "Ünïcödé <b> 北京 🙂\n  x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.pad_token_id is not None
    return found


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.meta_path.insert(0, _Hidden())
    main(Path(sys.argv[1]))
