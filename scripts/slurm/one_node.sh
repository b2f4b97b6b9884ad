#!/usr/bin/env bash
# Run a command in a SLURM cluster whose only node is this machine, to try job scripts without a cluster.
#     scripts/slurm/one_node.sh bash          # then sinfo, sbatch, squeue, ...
# Needs the programs of Debian's packages slurmctld, slurmd, slurm-client and munge, but not their system services; it
# writes only to a temporary folder. Partitions: batch, and urgent, whose jobs preempt those of batch (signal, GRACE
# seconds, requeue). All daemons listen on the loopback address only.
set -euo pipefail

GRACE=${GRACE:-30}  # seconds between a preempted job's SIGTERM and its end
TASKS=${TASKS:-2}   # tasks that may run at once, whatever the number of processors
(($# > 0)) || set -- bash

PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || { echo "$0: no $program: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 1; }
done

folder=$(mktemp -d "${TMPDIR:-/tmp}/slurm.XXXXXX")
chmod 755 "$folder"
mkdir -m 755 "$folder/munge"  # the socket is public, the key is not
mkdir -m 700 "$folder/state" "$folder/spool"
host=$(hostname -s)
user=$(id -un)
read -r port1 port2 < <(python3 - <<'PYTHON'
import socket

sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
)

cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port1
SlurmdPort=$port2
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# a requeued job waits for as long as a credential is valid: 120 seconds by default
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# no cgroups: a container may not have them
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
ReturnToService=2
MpiDefault=none
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 CPUs=$TASKS State=UNKNOWN
PartitionName=batch Nodes=localhost Default=YES PriorityTier=1 GraceTime=$GRACE MaxTime=INFINITE
PartitionName=urgent Nodes=localhost PriorityTier=2 MaxTime=INFINITE
CONF
export SLURM_CONF=$folder/slurm.conf

ready=
started=()
stop() {
    if [[ -n $ready ]]; then # jobs outlive the daemons
        timeout 10 scancel --user="$user" || true
        for _ in $(seq 300); do
            [[ -n $(timeout 10 squeue --noheader) ]] || break
            sleep 0.2
        done
    fi
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do
        kill "${started[i]}" 2>/dev/null || continue
        wait "${started[i]}" || true
    done
    rm -rf "$folder"
}
trap stop EXIT

# Daemons run in the foreground, as children of this script, which stops them by process id.
head -c 1024 /dev/urandom >"$folder/munge/key"
chmod 400 "$folder/munge/key"
munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --num-threads=2 2>"$folder/munge/err" &
started+=($!)
slurmctld -D -i >"$folder/out" 2>&1 &
started+=($!)
slurmd -D -N localhost >"$folder/out2" 2>&1 &
started+=($!)
for _ in $(seq 60); do
    [[ $(sinfo --noheader --partition=batch --format=%T 2>/dev/null) == idle ]] && ready=1 && break
    sleep 1
done
if [[ -z $ready ]]; then
    echo "$0: SLURM did not start:" >&2
    tail -n 20 "$folder"/*.log "$folder"/munge/err >&2
    exit 1
fi
"$@"
