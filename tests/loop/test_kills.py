"""A loop that was killed in its stages and started again has the bytes of one that was not (tests/kill_loop.py)."""

import json


def test_kills_in_the_stages(preloaded, repo_root, tmp_path):
    out = tmp_path / "kills.json"
    done = preloaded.run(repo_root / "tests" / "kill_loop.py", "--kills", "4", "--seed", "1", "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kills"] == 4 and not found["different"]
