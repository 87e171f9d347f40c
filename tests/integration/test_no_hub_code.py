"""No code is fetched from a hub, in a process of its own: libraries look for it as they load."""

import os
import subprocess
import sys
from pathlib import Path

import silotune
from tests.integration.models.test_quantization import build_wide


def test_no_code_is_asked_of_a_package_named_kernels(tmp_path):
    """bitsandbytes 0.50 fetches it from the hub, on processors that multiply bfloat16."""
    wide = build_wide(tmp_path / "wide")
    trap = tmp_path / "trap" / "kernels"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text(
        "from pathlib import Path\n"
        "def get_kernel(name, *a, **k):\n"
        f"    Path({str(tmp_path / 'sprung')!r}).write_text(name)\n"
        "    raise RuntimeError('code from the hub')\n"
    )
    program = (
        "import sys, torch\n"
        "from silotune.models.adapters import AdapterConfig\n"
        "from silotune.models.base import ModelConfig\n"
        "from silotune.models.loading import load_model\n"
        f"model = ModelConfig(name={str(wide)!r}, dtype='float32', quantization='nf4')\n"
        "loaded = load_model(model, AdapterConfig(targets=('q_proj',)), seed=1, device='cpu')\n"
        "with torch.inference_mode():\n"
        "    loaded.model(input_ids=torch.zeros(1, 2, dtype=torch.int64))\n"
        "import bitsandbytes, kernels\n"  # others find it as it was
        f"assert kernels.__file__ == {str(trap / '__init__.py')!r}\n"
    )
    found = os.pathsep.join([str(trap.parent), str(Path(silotune.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": found, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sprung").exists()
