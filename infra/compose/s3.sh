#!/bin/sh
# SeaweedFS with its S3 gateway, one node. Runs in the image chrislusf/seaweedfs.
set -eu
umask 077
cat > /tmp/s3.json <<END
{"identities": [{"name": "dpdl", "actions": ["Admin", "Read", "List", "Tagging", "Write"],
  "credentials": [{"accessKey": "$(cat /run/secrets/s3_access_key)",
                   "secretKey": "$(cat /run/secrets/s3_secret_key)"}]}]}
END
# One volume to begin a bucket with, not seven; their number is free disk / their size (0) and not
# eight: three buckets of seven could not all store something.
export WEED_MASTER_VOLUME_GROWTH_COPY_1=1
# `weed server` keeps lifecycle rules and carries out none: evidence expires by its shell, each hour.
while sleep 3600 && kill -0 $$; do
  echo "s3.lifecycle.run-shard -shards 0-15 -events 0 -runtime 1h -s3 127.0.0.1:18333" |
    weed -logtostderr=true shell -master=127.0.0.1:9333 || :  # tried again in an hour
done &
# Only the S3 gateway leaves the container: master, volume and filer ask for no keys.
exec weed -logtostderr=true server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir=/data \
  -filer -s3 -s3.port=8333 -s3.ip.bind=0.0.0.0 -s3.config=/tmp/s3.json \
  -s3.port.iceberg=0 -s3.port.lance=0 -s3.allowDeleteBucketNotEmpty=false \
  -master.telemetry=false -master.volumeSizeLimitMB=128 -volume.max=0 -volume.minFreeSpace=1GiB
