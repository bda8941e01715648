"""For whom each RPC is: the one table of roles.

The contract's comments say the same ("Role: VIEWER.", "Caller: a neuron."); a test compares them,
and fails for an RPC that is not here.
"""

from __future__ import annotations

from collections.abc import Mapping

from federation_server.domain.access import Caller

REGISTER = "/federation.v1.SessionService/Register"
CONNECT = "/federation.v1.SessionService/Connect"
DEREGISTER = "/federation.v1.SessionService/Deregister"

METHODS: Mapping[str, Caller] = {
    # neurons
    REGISTER: Caller.ANYONE,  # it checks credentials of its own
    "/federation.v1.SessionService/RefreshToken": Caller.NEURON,
    CONNECT: Caller.NEURON,
    DEREGISTER: Caller.NEURON,
    "/federation.v1.SessionService/SendHeartbeat": Caller.NEURON,
    "/federation.v1.SessionService/ReportAnalytics": Caller.NEURON,
    "/federation.v1.SessionService/PullCommands": Caller.NEURON,
    "/federation.v1.SessionService/ReportCommand": Caller.NEURON,
    # admins
    "/federation.v1.FleetService/GetNeuron": Caller.VIEWER,
    "/federation.v1.FleetService/ListNeurons": Caller.VIEWER,
    "/federation.v1.FleetService/UpdateNeuron": Caller.OPERATOR,
    "/federation.v1.FleetService/DeactivateNeuron": Caller.OPERATOR,
    "/federation.v1.FleetService/ActivateNeuron": Caller.OPERATOR,
    "/federation.v1.FleetService/DeleteNeuron": Caller.ADMIN,
    "/federation.v1.FleetService/GetFleetOverview": Caller.VIEWER,
    "/federation.v1.FleetService/ListHeartbeats": Caller.VIEWER,
    "/federation.v1.CommandService/IssueCommand": Caller.OPERATOR,
    "/federation.v1.CommandService/GetCommand": Caller.VIEWER,
    "/federation.v1.CommandService/ListCommands": Caller.VIEWER,
    "/federation.v1.CommandService/ExecuteCommand": Caller.OPERATOR,
    "/federation.v1.CommandService/WatchCommand": Caller.VIEWER,
    "/federation.v1.CommandService/CancelCommand": Caller.OPERATOR,
    "/federation.v1.CommandService/RetryCommand": Caller.OPERATOR,
    "/federation.v1.CommandService/ExplainCommand": Caller.VIEWER,
    "/federation.v1.CommandService/IssueCommandBatch": Caller.OPERATOR,
    "/federation.v1.CommandService/GetCommandBatch": Caller.VIEWER,
    "/federation.v1.CommandService/ListCommandBatches": Caller.VIEWER,
    "/federation.v1.CommandService/WatchCommandBatch": Caller.VIEWER,
    "/federation.v1.CommandService/CancelCommandBatch": Caller.OPERATOR,
    "/federation.v1.AnalyticsService/QueryMetrics": Caller.VIEWER,
    "/federation.v1.AnalyticsService/ListMetricNames": Caller.VIEWER,
    "/federation.v1.AnalyticsService/ListReportedEvents": Caller.VIEWER,
    "/federation.v1.AccessService/CreateEnrollmentToken": Caller.ADMIN,
    "/federation.v1.AccessService/ListEnrollmentTokens": Caller.ADMIN,
    "/federation.v1.AccessService/RevokeEnrollmentToken": Caller.ADMIN,
    "/federation.v1.AccessService/ApproveNeuron": Caller.ADMIN,
    "/federation.v1.AccessService/RejectNeuron": Caller.ADMIN,
    "/federation.v1.AccessService/RevokeNeuronTokens": Caller.ADMIN,
    "/federation.v1.AccessService/CreateApiKey": Caller.ADMIN,
    "/federation.v1.AccessService/ListApiKeys": Caller.ADMIN,
    "/federation.v1.AccessService/RotateApiKey": Caller.ADMIN,
    "/federation.v1.AccessService/ExpireApiKey": Caller.ADMIN,
    "/federation.v1.AccessService/RevokeApiKey": Caller.ADMIN,
    "/federation.v1.AccessService/ListSigningKeys": Caller.ADMIN,
    "/federation.v1.AccessService/RotateSigningKey": Caller.ADMIN,
    # about the server
    "/grpc.health.v1.Health/Check": Caller.ANYONE,
    "/grpc.health.v1.Health/List": Caller.ANYONE,
    "/grpc.health.v1.Health/Watch": Caller.ANYONE,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Caller.ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Caller.ANYONE,
    "/grpc.channelz.v1.Channelz/GetTopChannels": Caller.ADMIN,
    "/grpc.channelz.v1.Channelz/GetServers": Caller.ADMIN,
    "/grpc.channelz.v1.Channelz/GetServer": Caller.ADMIN,
    "/grpc.channelz.v1.Channelz/GetServerSockets": Caller.ADMIN,
    "/grpc.channelz.v1.Channelz/GetChannel": Caller.ADMIN,
    "/grpc.channelz.v1.Channelz/GetSubchannel": Caller.ADMIN,
    "/grpc.channelz.v1.Channelz/GetSocket": Caller.ADMIN,
}
