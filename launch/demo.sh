#!/usr/bin/env bash
# Runs the default job on the GPUs that are present, else on two CPU ranks. Arguments go to launch/train.py.
# Called by `make demo`; by hand, activate the virtual environment first.
set -euo pipefail
cd "$(dirname "$0")/.."

# What torch can use decides, not what is plugged in: a CPU build of torch on a GPU node runs on the CPU.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
# Not DeepSpeed's fixed port: two jobs on one node must not meet.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

ranks=()
if [[ $gpus -eq 0 || ${DS_ACCELERATOR:-} == cpu ]]; then
    export DS_ACCELERATOR=cpu
    ranks=(--num_gpus 2) # the launcher's word for ranks on any accelerator
    # Two ranks that each start a thread per core would be slower than one.
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
    echo "demo: no GPU in use, two CPU ranks with $OMP_NUM_THREADS thread(s) each"
else
    echo "demo: $gpus GPU(s)"
fi
exec deepspeed "${ranks[@]}" --master_port "$port" launch/train.py --config demo "$@"
