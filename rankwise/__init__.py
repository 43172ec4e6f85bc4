"""rankwise: a prompt with K ranked answers; a policy learns the ranking, K-wise, against a reference.

This package is the ML core. It needs torch and transformers, and nothing of the orchestration around it, so it runs on
a bare GPU machine. Floors, lowest first (a module imports only from floors below its own; import-linter holds this):

    types                                                       the nouns
    rows, fingerprint, store, progress, runtime                 tables, identities, row-keyed stores
    rendering, objectives, logprobs, attention, parallel, ...   one idea each
    batching, flops                                             rows <-> tensors
    scoring, rewards                                            a model as a function of a batch
    generation, judging                                         answers from prompts, replies from answers
    reference, rollouts, evaluation                             a model over a whole table
    learners, then resuming, tallies, training                  the loop
    plan                                                        what a run will take, before it is launched
"""
