#!/usr/bin/env bash
# A real SLURM on this machine alone, for tests/whole/test_slurm.py: a controller and two virtual nodes, each with a host
# name of its own, all on loopback, with accounting (slurmdbd, MariaDB) if DB=1. Root; no systemd. Everything lies in one folder, settings and keys
# too, so that a cluster that this machine belongs to is left alone.
#
#     slurm.sh install        Debian's packages, once; with DB=1 those of accounting too
#     eval "$(slurm.sh up DIR)"; ...; slurm.sh down DIR
#
# "up" prints the settings that SLURM's commands need. By environment: GRACE, KILL_WAIT, MAX_ARRAY, MIN_AGE, CGROUP=1 (a
# job sees its own device alone). Each node shows two GPUs that nobody can open.
set -euo pipefail
do=$1 D=${2:-/tmp/convnn_slurm} N=2
alive() { [ -s "$D/pid/$1" ] && kill -0 "$(cat "$D/pid/$1")" 2>/dev/null; }
start() { local name=$1; shift; alive "$name" && return; setsid "$@" >"$D/log/$name.out" 2>&1 </dev/null & echo $! >"$D/pid/$name"; }
retry() { for _ in $(seq 200); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; echo "slurm.sh: gave up on: $*" >&2; return 1; }
stop() {
  local pid; [ -s "$D/pid/$1" ] || return 0
  pid=$(cat "$D/pid/$1"); kill "$pid" 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true; rm -f "$D/pid/$1"
}
case $do in
install)
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge \
    $([ "${DB:-0}" = 1 ] && echo slurmdbd mariadb-server) >/dev/null ;;
down)
  export SLURM_CONF=$D/etc/slurm.conf
  timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 150); do [ -z "$(timeout 10 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  for i in $(seq "$N"); do stop "node$i"; done
  stop slurmctld; stop slurmdbd; stop mariadb; stop munged; rm -rf "$D"
  for i in $(seq "$N"); do find /sys/fs/cgroup -depth -type d -path "*slurm_node$i*" -exec rmdir {} + 2>/dev/null || true; done ;;
up)
  mkdir -p "$D"/{pid,log,etc,munge} "$D"/state/{ctl,node1,node2}; chmod 755 "$D"
  for i in 0 1; do [ -e "$D/gpu$i" ] || mknod "$D/gpu$i" c 240 "$i"; done
  [ -s "$D/munge/key" ] || dd if=/dev/urandom of="$D/munge/key" bs=1k count=1 status=none
  chown -R munge: "$D/munge"; chmod 400 "$D/munge/key"; chmod 755 "$D/munge"
  M=$D/munge
  start munged setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --key-file="$M/key" \
    --socket="$M/socket" --pid-file="$M/pid" --log-file="$M/log" --seed-file="$M/seed" --force
  retry munge -n -S "$M/socket"
  cat >"$D/etc/slurm.conf" <<CONF
ClusterName=convnn
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$M/socket
ReturnToService=2
SlurmdParameters=config_overrides
ProctrackType=proctrack/$([ "${CGROUP:-0}" = 1 ] && echo cgroup || echo linuxproc)
TaskPlugin=task/$([ "${CGROUP:-0}" = 1 ] && echo cgroup || echo none)
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MaxArraySize=${MAX_ARRAY:-1001}
KillWait=${KILL_WAIT:-10}
MinJobAge=${MIN_AGE:-300}
SlurmdTimeout=20
SlurmctldPidFile=$D/state/slurmctld.pid
SlurmdPidFile=$D/state/slurmd.%n.pid
SlurmdSpoolDir=$D/state/%n
StateSaveLocation=$D/state/ctl
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/%n.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-$N] NodeAddr=127.0.0.1 Port=[16818-$((16817 + N))] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=${GRACE:-0} State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 State=UP
$([ "${DB:-0}" = 1 ] && printf 'AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort=16820\nAccountingStoragePass=%s' "$M/socket" ||
    echo AccountingStorageType=accounting_storage/none)
CONF
  echo "NodeName=node[1-$N] Name=gpu File=$D/gpu[0-1]" >"$D/etc/gres.conf"
  printf '%s\n' CgroupPlugin=cgroup/v1 ConstrainDevices=yes ConstrainRAMSpace=yes ConstrainSwapSpace=yes >"$D/etc/cgroup.conf"
  { cat /etc/hosts; echo "127.0.0.1 node1 node2"; } >"$D/etc/hosts"
  export SLURM_CONF=$D/etc/slurm.conf
  if [ "${DB:-0}" = 1 ]; then
    B=$D/mariadb; mkdir -p "$B"; chown mysql: "$B"
    [ -d "$B/data" ] || mysql_install_db --no-defaults --user=mysql --datadir="$B/data" >"$D/log/install.out" 2>&1
    start mariadb mariadbd --no-defaults --user=mysql --datadir="$B/data" --bind-address=127.0.0.1 --port=16821 \
      --socket="$B/socket" --pid-file="$B/pid" --innodb-buffer-pool-size=32M --innodb-lock-wait-timeout=900
    retry mariadb --socket="$B/socket" -e 'select 1'
    mariadb --socket="$B/socket" -e "create database if not exists slurm_acct_db; grant all on slurm_acct_db.* to slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@127.0.0.1 identified by 'slurm'"
    printf '%s\n' AuthType=auth/munge "AuthInfo=socket=$M/socket" DbdHost=localhost DbdAddr=127.0.0.1 DbdPort=16820 SlurmUser=root \
      StorageType=accounting_storage/mysql StorageHost=127.0.0.1 StoragePort=16821 StorageUser=slurm StoragePass=slurm \
      "LogFile=$D/log/slurmdbd.log" "PidFile=$D/state/slurmdbd.pid" >"$D/etc/slurmdbd.conf"
    chmod 600 "$D/etc/slurmdbd.conf"
    start slurmdbd slurmdbd -D
    retry sacctmgr -n show cluster
    sacctmgr -n show cluster convnn | grep -q convnn || sacctmgr -i add cluster convnn >/dev/null
  fi
  start slurmctld slurmctld -D -i
  retry scontrol ping
  for i in $(seq "$N"); do start "node$i" unshare --uts --mount sh -c "hostname node$i && mount --bind $D/etc/hosts /etc/hosts && exec slurmd -D -N node$i"; done
  retry sh -c "[ \$(sinfo -h -N -p main -t idle,alloc,mix | wc -l) = $N ]"
  echo "export SLURM_CONF=$SLURM_CONF" ;;
*) echo "slurm.sh install|up|down [DIR]" >&2; exit 2 ;;
esac
