"""arealtrio: the rollout half of asynchronous RL for language models."""

from .asyncio_workflow import AsyncioWorkflow
from .config import RolloutConfig
from .controller import RolloutController
from .engine import RemoteEngine, open_engine
from .errors import (
    ArealTrioError,
    ConfigError,
    ConnectFailed,
    DeadlineExceeded,
    InvalidRequest,
    LedgerError,
    NoServerAvailable,
    ProtocolError,
    RequestRejected,
    ResponseTooLarge,
    RewardCrashed,
    RewardError,
    RewardRaised,
    RewardTimedOut,
    RolloutClosed,
    RolloutCrashed,
    RolloutError,
    ServerError,
    StalenessBudgetExhausted,
    TooManyFailures,
    TooStale,
    TransportError,
    TransportTimeout,
    UsageError,
    WeightUpdateError,
    WorkflowError,
)
from .executor import WorkflowExecutor, open_executor
from .group_policy import GroupPolicy
from .ledger import Ledger, LedgerStatistics, open_ledger
from .reward import AsyncRewardWrapper, ProcessReward, RewardOutcome, RewardPool
from .rows import RowBuilder
from .scheduling import (
    LeastRequestPolicy,
    LeastRequestPrioritySchedulePolicy,
    RoundRobinPolicy,
    RoundRobinSchedulePolicy,
    SchedulePolicy,
)
from .servers import ServerStatistics
from .settlement import Failure, RolloutResult
from .staleness import Permit, RolloutStat, StalenessManager
from .status import AdmissionStatus, ExecutorStatus, MemberStatus, Stage
from .tally import EngineStatistics
from .trajectory import Batch, CollateBuffers, Group
from .types import (
    FailureKind,
    GenerationHyperparameters,
    ModelRequest,
    ModelResponse,
    Outcome,
    Segment,
    Trajectory,
)
from .weights import AdapterSpec, TensorSpec, WeightsGroup, WeightUpdate, WeightUpdateResult
from .workflow import MultiTurnWorkflow, RLVRWorkflow, RolloutWorkflow, SingleTurnWorkflow

__all__ = [
    "AdapterSpec",
    "AdmissionStatus",
    "ArealTrioError",
    "AsyncRewardWrapper",
    "AsyncioWorkflow",
    "Batch",
    "CollateBuffers",
    "ConfigError",
    "ConnectFailed",
    "DeadlineExceeded",
    "EngineStatistics",
    "ExecutorStatus",
    "Failure",
    "FailureKind",
    "GenerationHyperparameters",
    "Group",
    "GroupPolicy",
    "InvalidRequest",
    "LeastRequestPolicy",
    "LeastRequestPrioritySchedulePolicy",
    "Ledger",
    "LedgerError",
    "LedgerStatistics",
    "MemberStatus",
    "ModelRequest",
    "ModelResponse",
    "MultiTurnWorkflow",
    "NoServerAvailable",
    "Outcome",
    "Permit",
    "ProcessReward",
    "ProtocolError",
    "RLVRWorkflow",
    "RemoteEngine",
    "RequestRejected",
    "ResponseTooLarge",
    "RewardCrashed",
    "RewardError",
    "RewardOutcome",
    "RewardPool",
    "RewardRaised",
    "RewardTimedOut",
    "RolloutClosed",
    "RolloutConfig",
    "RolloutController",
    "RolloutCrashed",
    "RolloutError",
    "RolloutResult",
    "RolloutStat",
    "RolloutWorkflow",
    "RoundRobinPolicy",
    "RoundRobinSchedulePolicy",
    "RowBuilder",
    "SchedulePolicy",
    "Segment",
    "ServerError",
    "ServerStatistics",
    "SingleTurnWorkflow",
    "Stage",
    "StalenessBudgetExhausted",
    "StalenessManager",
    "TensorSpec",
    "TooManyFailures",
    "TooStale",
    "Trajectory",
    "TransportError",
    "TransportTimeout",
    "UsageError",
    "WeightUpdate",
    "WeightUpdateError",
    "WeightUpdateResult",
    "WeightsGroup",
    "WorkflowError",
    "WorkflowExecutor",
    "open_engine",
    "open_executor",
    "open_ledger",
]
