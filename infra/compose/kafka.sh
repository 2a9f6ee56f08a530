#!/bin/bash
# Apache Kafka, one node (KRaft), clients by SASL/SCRAM. Runs in the image apache/kafka.
# The password goes from its secret into files that only this user reads, and onto no command line.
set -euo pipefail
umask 077
kafka=/opt/kafka
data=/var/lib/kafka/data
user=dpdl
password=$(cat /run/secrets/kafka_password)
scram=org.apache.kafka.common.security.scram.ScramLoginModule
plain=org.apache.kafka.common.security.plain.PlainLoginModule

cat > /tmp/server.properties <<END
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:9093
listeners=CLIENT://:9092,CONTROLLER://127.0.0.1:9093
advertised.listeners=CLIENT://127.0.0.1:9092,CONTROLLER://127.0.0.1:9093
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
listener.security.protocol.map=CLIENT:SASL_PLAINTEXT,CONTROLLER:SASL_PLAINTEXT
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
sasl.mechanism.controller.protocol=PLAIN
listener.name.client.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.client.scram-sha-512.sasl.jaas.config=$scram required username="$user" password="$password";
listener.name.controller.sasl.enabled.mechanisms=PLAIN
listener.name.controller.plain.sasl.jaas.config=$plain required username="controller" password="$password" user_controller="$password";
log.dirs=$data
auto.create.topics.enable=false
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# on disk within a second, as Valkey's file; by itself Kafka leaves that to the kernel, and after a
# power cut would lack frames that are already scored. The second line alone does nothing.
log.flush.scheduler.interval.ms=500
log.flush.interval.ms=500
# a frame of 32 MiB and what is around it
message.max.bytes=34603008
replica.fetch.max.bytes=34603008
END

cat > /tmp/client.properties <<END
security.protocol=SASL_PLAINTEXT
sasl.mechanism=SCRAM-SHA-512
sasl.jaas.config=$scram required username="$user" password="$password";
END

if [ ! -e "$data/meta.properties" ]; then
  # "@file" is read by the tool itself, a line per argument, and no newline at the end.
  arguments=$(printf '%s\n' format -t "$("$kafka/bin/kafka-storage.sh" random-uuid | tail -n 1)" \
    -c /tmp/server.properties --standalone \
    --add-scram "SCRAM-SHA-512=[name=$user,password=$password]")
  printf '%s' "$arguments" > /tmp/format.args
  "$kafka/bin/kafka-storage.sh" @/tmp/format.args
  rm /tmp/format.args
fi
exec "$kafka/bin/kafka-server-start.sh" /tmp/server.properties
