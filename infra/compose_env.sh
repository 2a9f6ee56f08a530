#!/bin/sh
# Prints what infra/compose.yaml asks for, with new random passwords, in the names that DPDL reads too:
#     (umask 077; sh infra/compose_env.sh > infra/.env)
# Keep the file as long as the volumes: the services remember their passwords.
set -eu
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
cat <<END
DPDL_KAFKA_BOOTSTRAP=127.0.0.1:9092
DPDL_KAFKA_SECURITY_PROTOCOL=SASL_PLAINTEXT
DPDL_KAFKA_SASL_MECHANISM=SCRAM-SHA-512
DPDL_KAFKA_SASL_USERNAME=dpdl
DPDL_KAFKA_SASL_PASSWORD=$(secret)
DPDL_S3_ENDPOINT=127.0.0.1:8333
DPDL_S3_ACCESS_KEY=$(secret)
DPDL_S3_SECRET_KEY=$(secret)
DPDL_REDIS_HOST=127.0.0.1
DPDL_REDIS_PORT=6379
DPDL_REDIS_PASSWORD=$(secret)
GRAFANA_ADMIN_PASSWORD=$(secret)
END
