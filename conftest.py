"""All tests but those of CUDA run on the CPU, where results are exact, though a GPU be there."""
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_cuda":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")            # for the programs that tests start
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
