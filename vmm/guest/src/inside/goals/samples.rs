//! Pages for tests: the same application in both formats, a large one, and strange ones.

use proptest::prelude::*;

/// Prometheus' text format 0.0.4.
pub const PROMETHEUS: &str = r#"# HELP http_request_duration_seconds Time \\ to answer
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{path="/a\"} 9",le="0.01"} 100
http_request_duration_seconds_bucket{path="/a\"} 9",le="0.025"} 130
http_request_duration_seconds_bucket{path="/a\"} 9",le="0.1"} 140
http_request_duration_seconds_bucket{path="/a\"} 9",le="+Inf"} 140
http_request_duration_seconds_sum{path="/a\"} 9"} 1.5
http_request_duration_seconds_count{path="/a\"} 9"} 140
http_request_duration_seconds_bucket{path="/b",le="0.01"} 10 1395066363000
http_request_duration_seconds_bucket{path="/b",le="0.025"} 2e1
http_request_duration_seconds_bucket{path="/b",le="0.1"} 20
http_request_duration_seconds_bucket{path="/b",le="+Inf"} 21
http_request_duration_seconds_sum{path="/b"} 0.5
http_request_duration_seconds_count{path="/b"} 21
# TYPE rpc_ms summary
rpc_ms{service="x",quantile="0.5"} 9
rpc_ms{service="x",quantile="0.99"} 48.5
rpc_ms_sum{service="x"} 1.7560473e+07
rpc_ms_count{service="x"} 300
rpc_ms{service="y",quantile="0.5"} 8
rpc_ms{service="y",quantile="0.99"} NaN
rpc_ms_count{service="y"} 0
# TYPE jobs_done_total counter
jobs_done_total{queue="one"} 1027 1395066363000
jobs_done_total{queue="two"} 3 1395066363000
# TYPE queue_length gauge
queue_length -12
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 12.5
# TYPE go_gc_duration_seconds summary
go_gc_duration_seconds{quantile="1"} 0.1
go_gc_duration_seconds_count 3
"#;

/// OpenMetrics 1.0.
pub const OPENMETRICS: &str = "# TYPE http_request_duration_seconds histogram\r
# UNIT http_request_duration_seconds seconds\r
# HELP http_request_duration_seconds Time to answer\r
http_request_duration_seconds_bucket{path=\"/a\\\\\",le=\"0.01\"} 100.0 # {trace_id=\"le=}\"} 0.0067 1520879607.789
http_request_duration_seconds_bucket{path=\"/a\\\\\",le=\"0.025\"} 130.0
http_request_duration_seconds_bucket{path=\"/a\\\\\",le=\"0.1\"} 140.0
http_request_duration_seconds_bucket{path=\"/a\\\\\",le=\"+Inf\"} 140.0
http_request_duration_seconds_count{path=\"/a\\\\\"} 140
http_request_duration_seconds_sum{path=\"/a\\\\\"} 1.5
http_request_duration_seconds_created{path=\"/a\\\\\"} 1520430000.123
http_request_duration_seconds_bucket{le=\"0.01\",path=\"/b\"} 10.0
http_request_duration_seconds_bucket{le=\"0.025\",path=\"/b\"} 2e1 1520879607.789
http_request_duration_seconds_bucket{le=\"0.1\",path=\"/b\"} 20.0
http_request_duration_seconds_bucket{le=\"+Inf\",path=\"/b\"} 21.0
http_request_duration_seconds_count{path=\"/b\"} 21
http_request_duration_seconds_sum{path=\"/b\"} 0.5
# TYPE jobs_done counter
# HELP jobs_done Jobs
jobs_done_total{queue=\"one\"} 1027 1520879607.789 # {id=\"x\"} 1
jobs_done_total{queue=\"two\"} 3.0
jobs_done_created{queue=\"one\"} 1520430000.123
# TYPE queue_length gauge
queue_length 12
# TYPE build info
build_info{version=\"1\"} 1
# EOF
jobs_done_total{queue=\"behind the end\"} 99999
";

/// A page of about so many bytes: one histogram of 12 buckets with many label sets.
pub fn large(bytes: usize, name: &str) -> Vec<u8> {
    use std::io::Write;
    let mut page = format!("# HELP {name} Time to answer\n# TYPE {name} histogram\n").into_bytes();
    for handler in 0.. {
        if page.len() >= bytes {
            break;
        }
        for at in 0..12 {
            let le = if at == 11 { "+Inf".to_owned() } else { format!("{}", 0.005 * f64::from(1 << at)) };
            let labels =
                format!("code=\"200\",handler=\"/api/v1/things/{handler}\",method=\"get\",le=\"{le}\"");
            writeln!(page, "{name}_bucket{{{labels}}} {}", 1000 + at * handler).unwrap();
        }
        writeln!(page, "{name}_count{{handler=\"/api/v1/things/{handler}\"}} 5000").unwrap();
    }
    page
}

/// Pages of what pages are made of, in any order, about a family `a`.
pub fn strange() -> impl Strategy<Value = String> {
    const PIECES: [&str; 36] = [
        "a",
        "a",
        "a_bucket",
        "a_total",
        "a_count",
        "a_sum",
        "b",
        "b_bucket",
        "# TYPE a ",
        "# UNIT a ",
        "# TYPE b ",
        "# HELP a",
        "# EOF",
        "counter",
        "gauge",
        "histogram",
        "summary",
        "seconds",
        "{",
        "}",
        "{le=\"",
        "{quantile=\"",
        "\"} ",
        "\"",
        ",",
        "=",
        "\\",
        " ",
        "\n",
        "\n",
        "\r\n",
        "1",
        "0.95",
        "-3e308",
        "1e308",
        "NaN",
    ];
    let piece = prop_oneof![30 => prop::sample::select(&PIECES).prop_map(str::to_owned), 1 => any::<char>().prop_map(String::from)];
    prop::collection::vec(piece, 0..80).prop_map(|pieces| pieces.concat())
}
