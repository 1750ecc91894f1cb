"""Ray Data runs, with transformers where vLLM's engine would be; its columns are those of Ray's own class for them."""

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'ray[data]' aiohttp")

from fastpo.errors import ConfigError
from fastpo.loop.sample_stage import read_samples, sample_stage
from fastpo.sampling import ray_sampler
from fastpo.sampling.check_sampler import check_sampler
from fastpo.sampling.items import Failure, Request, Response, seed_of
from fastpo.sampling.ray_sampler import RaySampler


class Engine:
    """In the place of vLLM's: one row to its columns."""

    def __init__(self, folder):
        from fastpo.sampling.local_sampler import LocalSampler

        self.sampler = LocalSampler(folder, use_cpu=True)

    def __call__(self, row):
        from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMOutputData

        params = dict(row["sampling_params"])
        assert params["n"] == 1 and params["min_p"] == 0 and params["repetition_penalty"] == 1
        if params["max_tokens"] == 13:
            empty = vLLMOutputData(prompt="", num_input_tokens=0).model_dump()
            return {"number": row["number"], **empty, "__inference_error__": "out of luck"}
        request = Request("x", 0, "policy", "", tuple(map(int, row["tokenized_prompt"])), int(params["seed"]),
                          params["temperature"], params["top_p"], max(0, params["top_k"]), params["max_tokens"],
                          tuple(params.get("stop") or ()))  # fmt: skip
        ((_, own),) = self.sampler.sample([request])
        ids, share = list(own.token_ids), own.logp / len(own.token_ids)
        data = vLLMOutputData(
            prompt="",
            prompt_token_ids=list(request.prompt_ids), num_input_tokens=len(request.prompt_ids), generated_tokens=ids,
            generated_text=own.text, num_generated_tokens=len(ids),
            logprobs=[{i: {"logprob": share, "rank": 1, "decoded_token": "x"}} for i in ids],
        )  # fmt: skip
        return {"number": row["number"], **data.model_dump(), "__inference_error__": ""}


@pytest.mark.slow
def test_rows_through_ray_are_responses(toy, tmp_path):
    pytest.importorskip("aiohttp", reason="ray.data.llm needs aiohttp")
    folder = str(tmp_path / "policy")
    model = toy.model()
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)

    def processor(dataset):
        made = dataset.map(Engine, fn_constructor_args=(folder,), concurrency=1, num_cpus=0.5)
        return made.map(ray_sampler._kept, num_cpus=0.1)

    import ray

    sampler = RaySampler(folder, processor=processor)
    requests = [Request(f"p{i}", k, "policy", "", tuple(range(3, 5 + i)), seed_of(i, k), max_tokens=30)
                for i in range(5) for k in range(2)]  # fmt: skip
    bad = Request("bad", 0, "policy", "", (5, 6), 1, max_tokens=13)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        counts = sample_stage(sampler, [*requests, bad], tmp_path / "part", bar=False, max_failed=0.5)
        with pytest.raises(ConfigError, match="take sample.engine=local"):
            list(sampler.sample([Request("p", 0, "negative", "", (3,), 1, contrast_ids=(4,))]))
    finally:
        sampler.close()
        ray.shutdown()
    assert counts["responses"] == 10 == counts["with_token_ids"] and counts["failed: error"] == 1
    found = read_samples(tmp_path / "part")
    pairs = [(r, found[r.id][r.k]) for r in requests]
    for _, response in pairs:
        assert response.finished is (response.token_ids[-1] == 0) and response.finished or len(response.token_ids) == 30
    assert check_sampler(pairs, model, toy.tokenizer())["difference"] < 1e-5


def test_what_a_row_says(toy):
    sampler = RaySampler("policy", toy.tokenizer())
    request = Request("p", 0, "policy", "", (3,), 1, stop=("w7",))
    good = {"number": 0, "generated_tokens": [4, 10], "generated_text": "w1 ", "logp": -2.0}
    assert sampler._answer(good, request) == Response("w1 ", (4, 10), True, -2.0)
    cut = {**good, "generated_tokens": [4, 5], "generated_text": "w1 w2", "logp": None}
    assert sampler._answer(cut, request) == Response("w1 w2", (4, 5), False)
    assert sampler._answer({**good, "generated_tokens": []}, request).status == "unparsed"
    assert isinstance(sampler._answer({**good, "__inference_error__": "x"}, request), Failure)
    kept = ray_sampler._kept(
        {"number": 3, "generated_tokens": [4], "generated_text": "w1", "logprobs": [{"4": {"logprob": -1}}]}
    )
    assert kept["logp"] == -1.0
    assert ray_sampler._kept({"number": 3, "generated_tokens": [4], "logprobs": [{9: {"logprob": -1}}]})["logp"] is None
