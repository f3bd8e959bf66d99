"""All public functions as kernels inside torch.compile(fullgraph=True); each alone, gradients and dynamic sizes are the reference floor's claim."""

from cases.compiled import compiles_as_a_whole


def test_compile_of_everything() -> None:
    compiles_as_a_whole(dynamic=False)
