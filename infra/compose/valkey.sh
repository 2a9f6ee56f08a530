#!/bin/sh
# Valkey with a password and an append-only file. Runs in the image valkey/valkey.
set -eu
umask 077
cat > /tmp/valkey.conf <<END
bind * -::*
requirepass $(cat /run/secrets/redis_password)
dir /data
save ""
appendonly yes
appendfsync everysec
# A full server refuses; it never drops an alert. Without a bound the machine's memory ends first, and
# the kernel kills one of its processes.
maxmemory $VALKEY_MAXMEMORY
maxmemory-policy noeviction
END
exec valkey-server /tmp/valkey.conf
