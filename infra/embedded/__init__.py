"""Apache Kafka, SeaweedFS and Valkey on loopback, for a machine that has none of them."""

from infra.embedded.services import SERVICE_NAMES, ServiceName
from infra.embedded.stack import ServiceStatus, Stack

__all__ = ["SERVICE_NAMES", "ServiceName", "ServiceStatus", "Stack"]
