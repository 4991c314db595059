#!/bin/bash
# `sbatch docs/clusters/slurm.sh recipe.yaml [key.path=value ...]`: a Ray cluster on the nodes of a Slurm job, and a run
# on it. Slurm asks it to stop two minutes before its time is over (or when it is preempted) and starts it again; the run
# goes on in its folder. Submit it from a folder that all nodes share.
#SBATCH --job-name=plait
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

source "${PLAIT_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"
port=$((20000 + SLURM_JOB_ID % 10000))
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | cut -d' ' -f1)

# One token for this cluster, in a file that only its owner reads; the processes inherit its path, not the token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SLURM_SUBMIT_DIR/.ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# Every node in one step; the first one is the head. The step ends with this script.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c "
  if [ \"\$SLURMD_NODENAME\" = \"$head_node\" ]; then
    exec ray start --block --head --node-ip-address=$head_ip --port=$port --dashboard-host=127.0.0.1
  fi
  until ray health-check --address=$head_ip:$port 2> /dev/null; do
    [ \$SECONDS -le 300 ] || exit 11
    sleep 1
  done
  exec ray start --block --address=$head_ip:$port" &
cluster=$!
until RAY_ADDRESS=$head_ip:$port ray status > /dev/null 2>&1; do
  if [ "$SECONDS" -gt 300 ] || ! kill -0 "$cluster" 2> /dev/null; then
    echo "no Ray head at $head_ip:$port after $SECONDS s; what it said is above" >&2
    exit 11
  fi
  sleep 1
done

# The run waits for missing nodes by itself (run.wait_seconds) and says which. SIGTERM goes to it alone: Ray must live
# until the checkpoint is written.
RAY_ADDRESS=$head_ip:$port plait train "$@" --continue &
run=$!
trap 'kill -TERM $run' TERM
code=0
wait "$run" || code=$?
if kill -0 "$run" 2> /dev/null; then # the signal ended the wait, not the run
  code=0
  wait "$run" || code=$?
fi
if [ "$code" -eq 3 ]; then # stopped with a checkpoint
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
