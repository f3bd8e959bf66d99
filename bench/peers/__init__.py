"""The methods that STEP grew out of, beside this package: `python -m bench peers`.

Written here from their published descriptions, no code of theirs, in eager PyTorch as their users run them: boolean masks and loops
over images. CTS shares 2x2 blocks, equally many in every image (Lu et al., "Content-aware Token Sharing", CVPR 2023); DToP lets
confident tokens leave at an exit (Tang et al., "Dynamic Token Pruning", ICCV 2023, arXiv 2308.01045); STEP (arXiv 2509.14165) is both,
with larger blocks and other counts in every image; there is no code of it to follow, so what can be done for the whole batch at once
is. Attention stores all scores, as theirs does, or is PyTorch's SDPA.

Weights, inputs, gate, clock and costs are those of `bench.model`; every peer repeats the recorded decisions that ours repeats. ToMe
(Bolya et al., ICLR 2023, arXiv 2210.09461) cannot; it runs through its own package where that is installed, see `tome`.

`decisions` the layouts that CTS can take, DToP's decisions, and both in the form that the peers hold them in; `sharing`, `exits` and
`attention` their parts; `contenders` puts them together; `tome` the package's; `registry` who takes part; `settings`, `measure` and `job` the command.
"""
