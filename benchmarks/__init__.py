"""rankwise measured against its peers: one command a question, the answer a table and a JSON record.

python -m benchmarks.train_step   how fast is an optimizer step (DPO, SFT), and what share of the machine does it use
python -m benchmarks.reference    how fast are the reference's log-probabilities, and what does a second pass recompute
python -m benchmarks.memory       how much memory does a step need
python -m benchmarks.rollouts     how fast are sampled answers, by each engine, against transformers' generate()
python -m benchmarks.loss_head    what does the vocabulary head alone cost, in time, memory and error
python -m benchmarks.attention    what does attention within prompt trees cost on a CPU
python -m benchmarks.toy_world    do DPO and policy gradients end at the optimum that can be computed
python -m benchmarks.judge_load   does a judge on a server bear faults, kills, a budget and many requests at once
python -m benchmarks.chaos        is anything lost, wrong or done twice where processes are killed at any moment
python -m benchmarks.faults       does a run bear full disks, servers that go away, a clock that jumps
python -m benchmarks.overhead     what do MLflow, DVC and Prefect add to a stage, and MLflow to a training step
python -m benchmarks.soak         does memory, or a row's time, grow with the tables of the default pipeline

Each runs ours and its peers' best settings alternately, in one go, on the same model and data, and refuses to time two
programs that do not compute the same thing. Every side works in a process of its own (benchmarks.worker), so that
neither sees the other's global settings, compiled code or memory. Nothing imports this package.
"""
