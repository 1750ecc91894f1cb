"""fastpo.sequence_logps: the model's own log-probabilities, response by response, whatever they are packed with."""

import numpy as np
import pytest
import torch

import fastpo
from fastpo.errors import DataError


def own(model, tokenizer, prompt, response):
    """[tokens]: of the response and the end behind it, alone, by the model's own forward, softmax in fp64."""
    ids = prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]
    more = response if isinstance(response, list) else [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids + more])).logits[0].double()
    logp = logits[:-1].log_softmax(-1).gather(1, torch.tensor([ids + more])[0, 1:, None])[:, 0]
    return logp[len(ids) - 1 :].numpy()


def test_every_form_of_row_in_its_order(toy):
    model, tokenizer = toy.model().train(), toy.tokenizer()
    again = "w1 w2 w3"
    rows = [
        {"prompt": again, "completion": " w4 w5"},
        {"prompt": "w9", "chosen": " w7", "rejected": " w8 w8 w8", "score": 3.0},
        {"prompt": again, "responses": [{"text": " w6 w7", "score": 1.0}, {"text": " w6"}, {"text": " w6 w7"}]},
        {"prompt": [5, 6, 7], "completion": [8, 9]},
    ]
    done = []

    def logps(part):
        return fastpo.sequence_logps(model, part, processing_class=tokenizer, progress=lambda *a: done.append(a))

    parts = [logps(part) for part in (rows[:3], rows[3:])]  # texts, then token ids
    out = parts[0] + parts[1]
    assert [len(row) for row in out] == [1, 2, 3, 1] and done[-2] == (6, 6)
    texts = [[" w4 w5"], [" w7", " w8 w8 w8"], [" w6 w7", " w6", " w6 w7"], [[8, 9]]]
    for row, responses, found in zip(rows, texts, out, strict=True):
        for response, logp in zip(responses, found, strict=True):
            assert logp.dtype == np.float32
            np.testing.assert_allclose(logp, own(model, tokenizer, row["prompt"], response), atol=2e-6)
    assert np.array_equal(out[2][0], out[2][2])
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


def test_by_path_and_with_an_adapter(toy, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = toy.model(), toy.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = toy.rows(12)
    plain = fastpo.sequence_logps(tmp_path, rows)
    small = fastpo.sequence_logps(str(tmp_path), rows, max_tokens=40)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data)
    other = fastpo.sequence_logps(adapted, rows, processing_class=tokenizer)
    for k, row in enumerate(rows):
        for side, name in enumerate(("chosen", "rejected")):
            np.testing.assert_allclose(plain[k][side], small[k][side], atol=2e-6)
            np.testing.assert_allclose(other[k][side], own(adapted, tokenizer, row["prompt"], row[name]), atol=2e-6)
    assert max(np.abs(a[0] - b[0]).max() for a, b in zip(plain, other, strict=True)) > 1e-3


def test_prompts_go_through_the_trunk_once(toy, monkeypatch):
    """Wherever their rows stand, so long as the micro-batch holds them."""
    from fastpo.models.policy import Policy

    seen, trunk = [], Policy._trunk_forward
    monkeypatch.setattr(
        Policy, "_trunk_forward", lambda self, ids, *rest: seen.append(len(ids)) or trunk(self, ids, *rest)
    )
    prompts = [" ".join(f"w{(7 * i + k) % 90}" for i in range(150)) for k in range(2)]
    rows = [{"prompt": prompts[k % 2], "completion": f" w{k} w{k}"} for k in range(8)]
    model = toy.model(hidden_size=256, intermediate_size=1024)
    fastpo.sequence_logps(model, rows, processing_class=toy.tokenizer(), verify=False)
    assert seen == [2 * 150 + 8 * 2]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"completion": " w1"}, "row 1 has no prompt"),
        ({"prompt": "w1"}, "row 1 has no response: expected one of completion, chosen, rejected, responses"),
        ({"prompt": "w1", "completion": ""}, "row 1"),
    ],
)
def test_rows_that_cannot_be_scored(toy, row, words):
    rows = [{"prompt": "w1", "completion": " w2"}, row]
    with pytest.raises(DataError, match=words) as raised:
        fastpo.sequence_logps(toy.model(), rows, processing_class=toy.tokenizer())
    assert "\n" not in str(raised.value)


def test_no_rows(toy):
    assert fastpo.sequence_logps(toy.model(), [], processing_class=toy.tokenizer()) == []
