"""rankwise: a prompt with K ranked answers; a policy learns the ranking, K-wise, against a reference.

This package is the ML core. It needs torch, transformers and accelerate, and nothing of the
orchestration around it, so it runs on a bare GPU machine. Floors, lowest first (a module imports
only from floors below its own; import-linter holds this):

    types                                                   the nouns
    rows, fingerprint, store, progress                      tables, identities, row-keyed stores
    rendering, objectives, logprobs, checkpoints, corpus    one idea each
    batching, generation, judging                           text <-> tensors <-> answers
    reference, evaluation                                   a model over a whole table
    training                                                the loop
"""
