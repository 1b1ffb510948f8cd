"""The second opinion: every family's models in PyTorch, written apart from the engine, tensor by tensor.

Nothing here shares arithmetic with `npllama`. Where the engine multiplies cosines and sines, the oracle multiplies
complex numbers; where the engine groups queries, the oracle repeats keys and values; where the engine replaces masked
scores, the oracle adds -inf to them; and every product, norm and softmax is torch's own. The two share what is not
arithmetic: the model folder, the configuration, the stored RoPE frequencies and the names of the taps.

The package runs from a checkout (``pip install -e .[oracle]``) as ``python -m oracle``; it is not installed, because
its name belongs to nobody.
"""
